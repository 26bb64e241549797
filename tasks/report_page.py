"""What the report says, as words and numbers for its template: pure functions from a run's document to plain dicts.

Digests are whole. Nothing here reads a file or knows of HTML, so that each sentence can be tested by itself.
Not covered: the timeline (tasks.report_timeline), the layout (tasks/report.html.j2), the curve (tasks.report_charts).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.report_words import NO_END, count, duration, interruptions, number, safe_link, steps_lost

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
CLASSES = 20  # more would be no table to read


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
    if trained.get("reused") and not _trained_here(document):
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


def _trained_here(document: Mapping[str, Any]) -> bool:
    """Whether the training is this run's own, reused because the run came again: resumed, or approved by a person."""
    if not document.get("resumed"):
        return False
    ends = [float(a["ended"]) for a in document.get("attempts", []) if a.get("ended")]
    return bool(ends) and ends[-1] >= float(document["started"])


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
