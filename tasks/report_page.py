"""What the report says, as words and numbers for its template: pure functions from a run's document to plain dicts.

Times are UTC, lengths have units, digests are whole. Nothing here reads a file or knows of HTML, so that each sentence
can be tested by itself. Not covered: the layout (tasks/report.html.j2), the curve (tasks.report_charts).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.workload import INTERRUPTIONS

CAUSES = {
    "complete": "complete",
    "spot": "spot reclaim",
    "consolidation": "consolidation",
    "node_lost": "node lost",
    "out_of_memory": "out of memory",
    "user_error": "error",
    "no_capacity": "no capacity",
    "cancelled": "cancelled",
    "deadline": "deadline",
    "": "running",
}
NO_END = ("complete", "", "no_capacity")  # nothing that ran was ended early
STATUS = {  # status -> (words, kind)
    "succeeded": ("in service", "good"),
    "unchanged": ("unchanged", "good"),
    "refused": ("refused by the gate", "bad"),
    "failed": ("failed", "bad"),
    "cancelled": ("cancelled", "warn"),
    "interrupted": ("interrupted", "warn"),
    "running": ("running", "warn"),
}
LINKS = {
    "prefect": "Flow run in Prefect",
    "mlflow_run": "Training run in MLflow",
    "model": "Model version in MLflow",
    "endpoint": "Endpoint",
}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)
CLASSES = 20  # more would be no table to read


def duration(seconds: float | None) -> str:
    """A length of time for people: '12 ms', '3.4 s', '2 min 05 s', '1 h 02 min'."""
    if seconds is None:
        return "–"
    if seconds < 0.00995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def moment(unix: float | None) -> str:
    """A point in time for people, in UTC; an en dash when there is none."""
    return time.strftime("%d %b %Y, %H:%M:%S UTC", time.gmtime(unix)) if unix else "–"


def number(value: Any) -> str:
    """A metric for people: four digits that matter, counts as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f") if abs(value) >= 10000 else str(int(value))
    return f"{value:.4g}"


def count(n: int, word: str) -> str:
    """'1 step', '2 steps'."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def steps_lost(attempt: Mapping[str, Any]) -> int:
    """Steps that this attempt trained and no checkpoint kept."""
    return max(0, int(attempt.get("reached_step", 0)) - int(attempt.get("to_step", 0)))


def interruptions(attempts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The attempts that the platform ended."""
    return [a for a in attempts if a.get("cause") in INTERRUPTIONS]


def safe_link(url: Any) -> str:
    """An http address as it is, anything else as nothing: a page must not run what a document says."""
    text = str(url or "")
    return text if text.startswith(("http://", "https://")) else ""


def summary(document: Mapping[str, Any]) -> str:
    """The run in one sentence."""
    status, attempts = document.get("status", ""), document.get("attempts", [])
    if status in ("failed", "cancelled", "interrupted"):
        step = next((s["name"] for s in document.get("steps", []) if s.get("status") in ("failed", "cancelled")), "")
        where = f" at {step}" if step else ""
        message = str(document.get("message", "")).rstrip(".")
        return f"{STATUS[status][0].capitalize()}{where}{': ' + message if message else ''}."
    parts = []
    trained: Mapping[str, Any] = next((s for s in document.get("steps", []) if s["name"] == "train_model"), {})
    cut, early = interruptions(attempts), [a for a in attempts if a.get("cause") not in (*NO_END, None)]
    if trained.get("reused"):
        parts.append("Training reused")
    elif early:
        errors = len(early) - len(cut)
        through = [count(n, word) for n, word in ((len(cut), "interruption"), (errors, "error")) if n]
        parts.append(f"Trained through {' and '.join(through)}")
        parts.append(f"{count(sum(steps_lost(a) for a in attempts), 'step')} lost")
    else:
        parts.append("Trained without an interruption" if attempts else "Started")
    gate, version = document.get("gate") or {}, document.get("model_version")
    if status == "refused":
        why = "; ".join(gate.get("refusals") or []) or str(document.get("message", "")).rstrip(".")
        parts.append(f"refused by the gate{': ' + why if why else ''}")
    else:
        if gate.get("value") is not None:
            parts.append(_bound(gate))
        if version and status in ("succeeded", "unchanged"):
            parts.append(f"version {version} in service")
    return ", ".join(parts) + "."


def _bound(gate: Mapping[str, Any]) -> str:
    """'accuracy 0.978 ≥ 0.95': what was measured against what was asked for."""
    value, bound, higher = gate["value"], gate.get("minimum"), gate.get("higher_is_better", True)
    if bound is None:
        return f"{gate['metric']} {number(value)}"
    sign = ("≥" if value >= bound else "<") if higher else ("≤" if value <= bound else ">")
    return f"{gate['metric']} {number(value)} {sign} {number(bound)}"


def tiles(document: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures at the top: {"value", "label", "note"}."""
    attempts, gate = document.get("attempts", []), document.get("gate") or {}
    metrics = evaluation.get("candidate") or document.get("metrics") or {}
    found = []
    metric = gate.get("metric") or ("accuracy" if "accuracy" in metrics else next(iter(metrics), ""))
    if metric in metrics:
        samples = metrics.get("samples")
        note = f"{number(samples)} held-out samples" if samples else "on held-out data"
        found.append({"value": number(metrics[metric]), "label": metric, "note": note})
    cut = interruptions(attempts)
    lost = sum(steps_lost(a) for a in attempts)
    if attempts:
        found.append(
            {
                "value": str(len(cut)),
                "label": "interruption" if len(cut) == 1 else "interruptions",
                "note": count(len(attempts), "attempt"),
            }
        )
        last = max(int(a.get("to_step", 0)) for a in attempts)
        found.append(
            {
                "value": str(lost),
                "label": "step lost" if lost == 1 else "steps lost",
                "note": f"of {number(last)} trained",
            }
        )
    began, ended = document.get("started"), document.get("ended")
    if began and ended:
        reused = sum(bool(s.get("reused")) for s in document.get("steps", []))
        found.append(
            {
                "value": duration(ended - began),
                "label": "from start to end",
                "note": f"{count(reused, 'step')} reused" if reused else "every step run",
            }
        )
    if document.get("model_version"):
        serves = document.get("status") in ("succeeded", "unchanged")
        found.append(
            {
                "value": str(document["model_version"]),
                "label": "model version",
                "note": "in service" if serves else "not in service",
            }
        )
    return found


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


def comparison(evaluation: Mapping[str, Any], gate: Mapping[str, Any]) -> list[dict[str, str]]:
    """Candidate against champion, metric by metric; the gate's own first."""
    mine, theirs = evaluation.get("candidate") or {}, evaluation.get("champion") or {}
    first = gate.get("metric", "")
    rows = []
    for name in sorted({*mine, *theirs}, key=lambda n: (n != first, n == "samples", n)):
        a, b = mine.get(name), theirs.get(name)
        change = ""
        if name != "samples" and isinstance(a, int | float) and isinstance(b, int | float):
            change = "±0" if a == b else f"{a - b:+.4g}".replace("-", "−")
        rows.append(
            {
                "name": name,
                "candidate": number(a),
                "champion": number(b),
                "change": change,
                "gate": "yes" if name == first else "",
            }
        )
    return rows


def confusion(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Counts of (label, answered label) as a table; None when the labels are no classes, or too many of them."""
    pairs: Counter[tuple[str, str]] = Counter()
    order: dict[str, Any] = {}
    for row in rows:
        truth, said = row.get("label"), (row.get("answer") or {}).get("label")
        if not isinstance(truth, str | int) or not isinstance(said, str | int):
            return None
        for value in (truth, said):
            order.setdefault(str(value), value)
        if len(order) > CLASSES:
            return None
        pairs[str(truth), str(said)] += 1
    if len(order) < 2:
        return None
    numbers = all(isinstance(v, int) for v in order.values())
    names = sorted(order, key=(lambda n: int(order[n])) if numbers else str)
    table = []
    for truth in names:
        total = sum(pairs[truth, said] for said in names)
        cells = [
            {
                "count": pairs[truth, said],
                "right": truth == said,
                "share": round(pairs[truth, said] / total, 3) if total else 0.0,
            }
            for said in names
        ]
        table.append({"name": truth, "cells": cells, "total": total, "right": pairs[truth, truth]})
    wrong = sorted(((n, a, b) for (a, b), n in pairs.items() if a != b), key=lambda t: (-t[0], t[1], t[2]))
    worst = [f"{a} answered as {b} ({n}×)" for n, a, b in wrong[:3]]
    return {
        "names": names,
        "rows": table,
        "worst": worst,
        "wrong": sum(n for n, _, _ in wrong),
        "total": sum(pairs.values()),
    }


def service(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """What check_endpoint measured: agreement, and latency as bars in percent of the longest."""
    check = evaluation.get("check")
    if not check:
        return None
    known = [
        (name, float(check[f"{name}_ms"]) / 1000) for name in ("p50", "p95") if check.get(f"{name}_ms") is not None
    ]
    longest = max((v for _, v in known), default=1.0) or 1.0
    agreement = check.get("agreement")
    return {
        "agreement": f"{100 * float(agreement):.4g} %" if agreement is not None else "",
        "samples": number(check.get("samples")),
        "accuracy": number(check.get("accuracy")) if check.get("accuracy") is not None else "",
        "model_accuracy": number(check.get("model_accuracy")),
        "latency": [{"name": n, "text": duration(v), "width": round(100 * v / longest, 1)} for n, v in known],
    }


def lineage(document: Mapping[str, Any], run_id: str) -> list[dict[str, str]]:
    """The way from a prediction back to the commit: {"what", "value", "note", "link"}."""
    links, attempts = document.get("links", {}), document.get("attempts", [])
    version = document.get("model_version")
    keys = {s["name"]: s.get("key", "") for s in document.get("steps", [])}
    cut = interruptions(attempts)
    serves = bool(version) and document.get("status") in ("succeeded", "unchanged")
    chain = [
        (
            "Prediction",
            f'"model_version": "{version}"' if serves else "",
            f'"model": "{document.get("pipeline", "")}", in every answer',
            links.get("endpoint"),
        ),
        ("Model version", str(version or ""), document.get("pipeline", ""), links.get("model")),
        ("Archive", document.get("mar_sha256") or "", "sha256 of the .mar in service", ""),
        ("MLflow run", run_id, "one run through all attempts", links.get("mlflow_run")),
        (
            "Training",
            keys.get("train_model", ""),
            f"{count(len(attempts), 'attempt')}, {count(len(cut), 'interruption')}" if attempts else "step key",
            "",
        ),
        ("Code", document.get("code_digest") or "", "digest of the model's module", ""),
        ("Data", document.get("data_digest") or "", "DVC digest", ""),
        ("Commit", document.get("git_sha") or "", str(document.get("rev") or ""), ""),
    ]
    return [{"what": w, "value": str(v), "note": str(n), "link": safe_link(link)} for w, v, n, link in chain if v]


def link_rows(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """The addresses that the run knows of."""
    links = document.get("links", {})
    return [{"text": text, "url": safe_link(links[name])} for name, text in LINKS.items() if safe_link(links.get(name))]
