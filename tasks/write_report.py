"""One HTML page about a run, complete in itself: it can be mailed, printed and opened in ten years without a network.

Run by hand: `python -m tasks.step write_report request.json result.json`. The page is written to a file first and then
put beside the MLflow run; if that server is away the file stands, and the result says why there is no address.
Not covered: what the page says (tasks.report_page), its curve (tasks.report_charts), its layout (tasks/report.html.j2).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deployments.errors import GiveUp, StepError
from tasks import report_page as page
from tasks import report_timeline, report_words
from tasks.report_charts import Mark, loss_curve, pieces_of
from training.verdict import sentence_of

WIDE, NARROW = (920, 300), (360, 240)  # CSS pixels: a small screen gets a picture of its own, not small letters


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """A run's document and the files its steps left. Files that are not there are left out of the page."""

    document: dict[str, Any]  # the run's document in the store
    progress: str = ""  # the trainer's JSON lines
    evaluation: dict[str, Any] = field(default_factory=dict)  # candidate, champion, champion_version, check
    heldout: str = ""  # heldout.jsonl
    html: str  # where the page goes
    tracking_uri: str = ""
    run_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The page."""

    html: str  # its file
    url: str  # its address in MLflow; empty when it is not there
    bytes: int
    note: str = ""  # why there is no address


def write_report(request: ReportRequest) -> Report:
    """Write the page and publish it. Raises GiveUp when the document lacks what every run has."""
    text = render(replace(request, document=with_decision(request)))
    target = Path(request.html)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(target)
    url, note = "", "no MLflow server was given"
    if request.tracking_uri and request.run_id:
        try:
            url = publish(target, request.tracking_uri, request.run_id, description=about(request.document))
            note = ""
        except StepError as error:  # the page is a copy for readers: a server that is away must not fail the run
            note = str(error)
    return Report(html=str(target), url=url, bytes=target.stat().st_size, note=note)


def with_decision(request: ReportRequest) -> dict[str, Any]:
    """The document, with the gate's decision. A refusal ends the step, so its numbers are on the version in MLflow."""
    document = request.document
    if document.get("status") != "refused" or document.get("gate") or not (request.tracking_uri and request.run_id):
        return document
    from tasks.mlflow_server import connect, told

    try:
        with told(request.tracking_uri, "reading the gate's decision"):
            found = connect(request.tracking_uri).search_model_versions(f"run_id = '{request.run_id}'")
    except StepError:  # the document's own message tells the refusal too
        return document
    version = next((v for v in found if v.tags.get("reprise.decision")), None)
    if version is None:
        return document
    return {**document, "gate": json.loads(version.tags["reprise.decision"]), "model_version": str(version.version)}


def loss_history(request: ReportRequest) -> list[dict[str, Any]]:
    """The loss of every step as MLflow has it: the trainer's own lines are one per half second. None if it is away."""
    if not (request.tracking_uri and request.run_id):
        return []
    from tasks.mlflow_server import connect, told

    try:
        with told(request.tracking_uri, "reading the loss"):
            history = connect(request.tracking_uri).get_metric_history(request.run_id, "train_loss")
    except StepError:  # the lines in the file are enough for a curve
        return []
    return [{"step": m.step, "loss": m.value, "time": m.timestamp / 1000} for m in history]


def about(document: Mapping[str, Any]) -> str:
    """What the MLflow run says of itself (Markdown): who trained it, and the way back to Prefect."""
    said = f"Run **{document['run']}**"
    if document.get("git_sha"):
        said += f", commit `{str(document['git_sha'])[:12]}`"
    if document.get("cause"):
        said += f", cause {document['cause']}"
    prefect = str((document.get("links") or {}).get("prefect") or "")
    back = f" [Flow run in Prefect]({prefect})." if prefect.startswith(("http://", "https://")) else ""
    return f"{said}.{back} Its report: Artifacts, report/report.html."


def publish(file: Path, tracking_uri: str, run_id: str, *, description: str = "") -> str:
    """Put the page beside the MLflow run as report/report.html, and `description` on the run's page; returns
    the address that shows the report."""
    from tasks.mlflow_server import connect, run_url, told

    client = connect(tracking_uri)
    with told(tracking_uri, "storing the report"), tempfile.TemporaryDirectory(prefix="reprise-report-") as scratch:
        run = client.get_run(run_id)
        copy = Path(scratch) / "report.html"
        shutil.copyfile(file, copy)
        client.log_artifact(run_id, str(copy), "report")
        if description:
            client.set_tag(run_id, "mlflow.note.content", description)
    return f"{run_url(tracking_uri, run.info.experiment_id, run_id)}/artifacts/report/report.html"


def render(request: ReportRequest) -> str:
    """The page as text."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    document = request.document
    for name in ("run", "pipeline", "status", "steps"):
        if name not in document:
            raise GiveUp(f"write_report.document: {name!r} is missing; expected the document of a run from the store")
    attempts = document.get("attempts", [])
    gate = document.get("gate") or {}
    rows = report_timeline.attempt_rows(attempts)
    pieces = pieces_of(read_lines(request.progress) + loss_history(request), attempts)
    marks = [Mark(step=r["step"], number=r["mark"], error=r["kind"] == "bad") for r in rows if r["mark"]]
    label = f"training loss by step, with {report_words.count(len(marks), 'interruption')}"
    curves = [
        Markup(loss_curve(pieces, marks, width=w, height=h, label=label))  # made here, of numbers
        for w, h in (WIDE, NARROW)
        if pieces
    ]
    words, kind = page.STATUS.get(document["status"], (document["status"], "warn"))
    if document["status"] == "succeeded" and not document.get("endpoint"):
        words = "succeeded"
    template = files("tasks").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=f"{document['pipeline']}, {document['run']}",
        pipeline=document["pipeline"],
        run=document["run"],
        status=words,
        kind=kind,
        summary=page.summary(document),
        facts=_facts(document),
        tiles=page.tiles(document, request.evaluation),
        timeline=report_timeline.timeline(document),
        curves=curves,
        profile=sentence_of(Path(request.progress).parent / "output") if request.progress else "",
        attempts=rows,
        comparison=page.comparison(request.evaluation, gate),
        champion=str(request.evaluation.get("champion_version") or gate.get("champion_version") or ""),
        version=str(document.get("model_version") or ""),
        gate=gate,
        confusion=page.confusion(read_lines(request.heldout)),
        service=page.service(request.evaluation),
        lineage=page.lineage(document, request.run_id),
        links=page.link_rows(document),
        ended=report_words.moment(document.get("ended")),
    )


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The line under the headline."""
    found = [("run", document["run"]), ("started", report_words.moment(document.get("started")))]
    if document.get("cause"):
        found.append(("cause", str(document["cause"])))
    if document.get("resumed"):
        found.append(("resumed", report_words.count(int(document["resumed"]), "time")))
    if document.get("place"):
        found.append(("place", str(document["place"])))
    if document.get("git_sha"):
        found.append(("commit", str(document["git_sha"])[:10]))
    return found


def read_lines(path: str) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; no file is no lines, and a line cut by a kill is left out."""
    found: list[dict[str, Any]] = []
    if not path or not Path(path).exists():
        return found
    with Path(path).open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict):
                found.append(entry)
    return found
