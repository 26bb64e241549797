"""The report's timeline and its table of attempts: pure functions from a run's document to rows and bars in percent.

Not covered: the other parts of the page (tasks.report_page), drawing it (tasks/report.html.j2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deployments.workload import INTERRUPTIONS
from tasks.report_words import CAUSES, NO_END, duration, steps_lost

TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)


def timeline(document: Mapping[str, Any]) -> dict[str, Any]:
    """Rows with bars in percent of the run: {"rows", "ticks", "cut", "bad"}: the last two name colours."""
    steps, attempts = document.get("steps", []), document.get("attempts", [])
    done = [s for s in steps if s.get("started")]
    if not done:
        began, ended = 0.0, 1.0
    else:
        began = min(float(s["started"]) for s in done)
        last = max(float(s.get("ended") or s["started"]) for s in done)
        ended = max(last, began + 0.1)
    span = ended - began

    def bar(start: float, end: float, kind: str, title: str) -> dict[str, Any]:
        left = min(100.0, max(0.0, 100 * (start - began) / span))
        return {
            "left": round(left, 3),
            "width": round(max(0.0, min(100 - left, 100 * (end - start) / span)), 3),
            "kind": kind,
            "title": title,
        }

    rows: list[dict[str, Any]] = []
    for step in steps:
        status = str(step.get("status", ""))
        row: dict[str, Any] = {
            "name": step["name"].replace("_", " "),
            "status": "reused" if step.get("reused") else status,
            "reason": step.get("reason", ""),
            "length": "" if step.get("reused") or not step.get("started") else duration(_length(step)),
            "bars": [],
        }
        if step.get("started") and not step.get("reused"):
            start, end = float(step["started"]), float(step.get("ended") or ended)
            mine = [a for a in attempts if start - 1 <= float(a["started"]) <= end + 1]
            if step["name"] == "train_model" and mine:
                row["bars"] = _attempt_bars(mine, start, end, bar)
            else:
                row["bars"] = [
                    bar(
                        start,
                        end,
                        "bad" if status in ("failed", "cancelled") else "work",
                        f"{row['name']}: {row['length']}",
                    )
                ]
        rows.append(row)
    kinds = {b["kind"] for r in rows for b in r["bars"]}
    return {
        "rows": rows,
        "ticks": _ticks(span) if done else [],
        "cut": "cut" in kinds,
        "bad": "bad" in kinds,
    }


def _length(step: Mapping[str, Any]) -> float | None:
    return float(step["ended"]) - float(step["started"]) if step.get("ended") else step.get("seconds")


def _attempt_bars(attempts: list[Mapping[str, Any]], start: float, end: float, bar: Any) -> list[dict[str, Any]]:
    """The training's row: an idle bar under everything, and a bar for each attempt."""
    bars = [bar(start, end, "idle", "waiting for a machine")]
    for attempt in attempts:
        ended = float(attempt.get("ended") or end)
        cause = str(attempt.get("cause", ""))
        kept = f"steps {attempt.get('from_step', 0)} to {attempt.get('to_step', 0)}"
        words = f"attempt {attempt['number']}: {CAUSES.get(cause, cause)}, {kept}"
        kind = "cut" if cause in INTERRUPTIONS else "work" if cause in ("complete", "") else "bad"
        if cause == "no_capacity":
            kind, words = "idle", f"attempt {attempt['number']}: {attempt.get('reason', '')}"
        bars.append(bar(float(attempt["started"]), min(ended, end), kind, words))
    return bars


def _ticks(span: float) -> list[dict[str, Any]]:
    """At most five marks under the timeline, at round times, the last far enough from the edge for its words."""
    step = next((t for t in TICKS if span / t <= 5), TICKS[-1])
    marks = [i * step for i in range(int(span / step) + 1)]
    return [{"left": round(100 * m / span, 3), "text": _tick(m)} for m in marks if m <= 0.94 * span]


def _tick(seconds: float) -> str:
    if seconds == 0:
        return "0"
    if seconds < 60:
        return f"{seconds:g} s"
    if seconds < 3600:
        return f"{seconds / 60:g} min"
    return f"{seconds / 3600:g} h"


def attempt_rows(attempts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The ledger for people. `mark` is the number that the curve shows where an attempt ended early, else 0."""
    rows: list[dict[str, Any]] = []
    mark = 0
    for attempt in attempts:
        cause = str(attempt.get("cause", ""))
        cut = cause in INTERRUPTIONS
        ended_early = cause not in NO_END
        mark += ended_early
        began, ended, saved = attempt.get("started"), attempt.get("ended"), attempt.get("notice_to_saved")
        rows.append(
            {
                "number": attempt.get("number", len(rows) + 1),
                "mark": mark if ended_early else 0,
                "cause": CAUSES.get(cause, cause),
                "kind": "cut" if cut else "good" if cause == "complete" else "bad" if ended_early else "warn",
                "reason": attempt.get("reason", ""),
                "steps": f"{attempt.get('from_step', 0)} – {attempt.get('to_step', 0)}",
                "lost": steps_lost(attempt),
                "idle": duration(attempt.get("idle_seconds")) if attempt.get("idle_seconds") else "–",
                "saved": duration(saved) if saved is not None else ("no notice" if cut else "–"),
                "length": duration(ended - began) if began and ended else "–",
                "where": _where(attempt),
                "step": int(attempt.get("reached_step", 0)),
            }
        )
    return rows


def _where(attempt: Mapping[str, Any]) -> str:
    """Capacity and node, and why that capacity was asked for."""
    found = " ".join(str(attempt.get(k, "")) for k in ("capacity", "node") if attempt.get(k)) or "–"
    return f"{found} ({attempt['asked']})" if attempt.get("asked") else found
