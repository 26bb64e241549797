"""What came of a run, as one sentence and as Markdown for Prefect's run page. Pure: a run's document in, text out.

It stands there as soon as there is something to tell: while a person is asked, and after every end. Not covered: the
HTML report (tasks.write_report), which this page links.
"""

from __future__ import annotations

from typing import Any

from deployments.workload import INTERRUPTIONS

LINKS = {
    "report_mlflow": "Report",
    "mlflow_run": "Training run in MLflow",
    "model": "Model version in MLflow",
}


def headline(document: dict[str, Any]) -> str:
    """The run in one sentence, without a period."""
    name, version = document["pipeline"], document["model_version"]
    return {
        "succeeded": f"{name} version {version} is in service",
        "unchanged": f"{name}: every step is reused, version {version} stays in service",
        "waiting": f"{name} version {version} waits for a decision: press Resume",
        "refused": f"{name}: refused, what was in service before stays there",
        "running": f"{name}: the run goes on",
    }.get(document["status"], f"{name}: {document['status']}")


def result_markdown(document: dict[str, Any]) -> str:
    """The page below its headline: what went wrong, the gate's words, a table of links and numbers."""
    told = [document["message"]] if document["message"] and document["status"] not in ("waiting", "unchanged") else []
    told += [f"- {sentence}" for sentence in (document.get("gate") or {}).get("sentences", ())]
    rows = [(LINKS[name], f"[open]({document['links'][name]})") for name in LINKS if document["links"].get(name)]
    if endpoint := document["endpoint"]:
        rows.append(("Endpoint", f"`curl -T FILE {endpoint}`"))
    rows += [(name, value) for name, value in _facts(document) if value]
    cells = [f"| {name} | {value.replace('|', '/')} |" for name, value in rows]
    return "\n".join([*told, "", f"| {document['run']} | {document['status']} |", "|---|---|", *cells])


def training_words(document: dict[str, Any]) -> str:
    """'3 attempts, 2 interruptions, 42 steps lost'."""
    attempts = document["attempts"]
    cut = [a for a in attempts if a["cause"] in INTERRUPTIONS]
    lost = sum(a["steps_lost"] for a in attempts)
    through = f"{count(len(cut), 'interruption')}, {count(lost, 'step')} lost" if cut else "no interruption"
    return f"{count(len(attempts), 'attempt')}, {through}"


def count(number: int, word: str) -> str:
    """'1 attempt', '2 attempts'."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def numbers(metrics: dict[str, float]) -> str:
    """'accuracy 0.9831, loss 0.0625'."""
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))


def _facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    check, decided = document.get("check"), document.get("approval") or {}
    said = f": {' '.join(decided['comment'].split())}" if decided.get("comment") else ""
    return [
        ("Held-out data", numbers(document["metrics"])),
        ("Decided by a person", f"{decided['decision']}{said}" if decided else ""),
        (
            "Endpoint checked",
            f"{check['samples']} samples, agreement {check['agreement']:.4g}, p95 {check['p95_ms']:.1f} ms"
            if check
            else "",
        ),
        ("Training", training_words(document) if document["attempts"] else ""),
        ("Commit, cause", f"`{document['git_sha'][:12]}`, {document['cause']}"),
        ("Changed for this run", ", ".join(f"`{text}`" for text in document["overrides"])),
    ]
