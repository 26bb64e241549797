"""The report: what it says of each kind of run, that it needs nothing but itself, and bad documents.

Not covered: its parts (test_report_page.py, test_report_timeline.py, test_report_words.py, test_report_charts.py).
"""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import GiveUp
from tasks.write_report import ReportRequest, about, render, write_report
from tests.tasks.report_kit import make_document, make_files

EVALUATION = {
    "candidate": {"accuracy": 0.97777, "loss": 0.081, "samples": 360},
    "champion": {"accuracy": 0.969, "loss": 0.1, "samples": 360},
    "champion_version": "2",
    "check": {
        "agreement": 1.0,
        "samples": 360,
        "accuracy": 0.9778,
        "model_accuracy": 0.9778,
        "p50_ms": 4.1,
        "p95_ms": 12.34,
    },
}


@pytest.fixture
def document() -> dict[str, Any]:
    return make_document()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return make_files(tmp_path)


class Page(HTMLParser):
    """Collects the text, the addresses and whether every element is closed."""

    VOID = frozenset({"meta", "br", "path", "use", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [str(v) for k, v in attrs if k in ("href", "src", "xlink:href", "action")]
        self.ids += [str(v) for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def test_whole_page(document: dict[str, Any], files: dict[str, str], tmp_path: Path) -> None:
    html = tmp_path / "reports" / "digits-1.html"
    request = ReportRequest(document=document, evaluation=EVALUATION, html=str(html), run_id="f" * 32, **files)
    report = write_report(request)
    assert report.html == str(html) and report.url == "" and report.note == "no MLflow server was given"
    assert report.bytes == html.stat().st_size > 10_000
    assert [p.name for p in html.parent.iterdir()] == ["digits-1.html"], "nothing is left beside it"
    text = html.read_text()
    shown = Page(text)
    assert shown.open == [], "every element is closed"
    said = " ".join(shown.text.split())
    assert "Trained through 2 interruptions, 20 steps lost, accuracy 0.9778 ≥ 0.95, version 3 in service." in said
    for words in (
        "24 Nov 2026, 08:00:00 UTC",
        "1 spot reclaim at step 40, saved 213 ms after the notice: nothing lost",
        "2 spot reclaim at step 90, without notice: 20 steps trained again",
        "100 % of 360 answers over HTTP agree with the trained model; accuracy 0.9778 there, 0.9778 in training.",
        "4.1 ms",
        "12 ms",
        "champion, version 2",
        "+0.00877",
        "2 of 30 answered wrongly; most often: 0 answered as 2 (1×), 1 answered as 2 (1×)",
        "d" * 32 + ".dir",
        "7f3a9c0d" * 5,
        "3 attempts, 2 interruptions",
    ):
        assert words in said, words
    assert "1795507" not in said, "no raw clock"


def test_a_profile_is_told(document: dict[str, Any], files: dict[str, str], tmp_path: Path) -> None:
    request = ReportRequest(document=document, html=str(tmp_path / "r.html"), **files)
    assert "Its profile" not in render(request)
    folder = Path(files["progress"]).parent / "output" / "profile"
    folder.mkdir(parents=True)
    (folder / "verdict.json").write_text('{"sentence": "small batch: <b>raise</b> batch_size"}')
    assert "Its profile: small batch: &lt;b&gt;raise&lt;/b&gt; batch_size" in render(request)


def test_page_needs_no_network_and_no_script(document: dict[str, Any], files: dict[str, str], tmp_path: Path) -> None:
    document["message"] = document["cause"] = "<script>alert(1)</script>"
    document["steps"][0].update(reused=True, started=None, ended=None, reason="<img src=x onerror=alert(1)>")
    text = render(ReportRequest(document=document, evaluation=EVALUATION, html="", run_id="f" * 32, **files))
    shown = Page(text)
    assert not shown.tags & {"script", "img", "iframe", "object", "link", "base", "form"}
    outside = {a for a in shown.addresses if not a.startswith("#")}
    assert outside == {"http://127.0.0.1:4200/runs/1"}, "links of the document only, and http only"
    assert not re.search(r"@import|url\((?!#)|@font-face", text)
    assert not re.search(r"\bon[a-z]+\s*=\s*[\"']", text)
    inside = [a.removeprefix("#") for a in shown.addresses if a.startswith("#")]
    assert set(inside) <= set(shown.ids) and len(set(shown.ids)) == len(shown.ids)


def test_same_run_same_bytes(document: dict[str, Any], files: dict[str, str]) -> None:
    request = ReportRequest(document=document, evaluation=EVALUATION, html="", **files)
    assert render(request) == render(request)


def test_bare_document_and_missing_files_still_make_a_page(tmp_path: Path) -> None:
    bare = {"run": "r", "pipeline": "p", "status": "running", "steps": []}
    report = write_report(
        ReportRequest(document=bare, progress="/nowhere", heldout="/nowhere", html=str(tmp_path / "r.html"))
    )
    assert Page(Path(report.html).read_text()).open == []
    with pytest.raises(GiveUp, match="document: 'steps' is missing"):
        render(ReportRequest(document={"run": "r", "pipeline": "p", "status": "x"}, html=""))


def test_server_away_leaves_the_file_and_says_so(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    request = ReportRequest(
        document=document, html=str(tmp_path / "r.html"), tracking_uri="http://127.0.0.1:18299", run_id="f" * 32
    )
    report = write_report(request)
    assert report.url == "" and "did not answer while storing the report" in report.note
    assert Path(report.html).exists()


def test_page_is_put_beside_the_mlflow_run(document: dict[str, Any], tmp_path: Path, database: str) -> None:
    from tasks.mlflow_server import connect

    uri = database
    client = connect(uri)
    experiment = client.create_experiment(tmp_path.name, artifact_location=str(tmp_path / "artifacts"))
    run = client.create_run(experiment)
    request = ReportRequest(
        document=document, html=str(tmp_path / "digits-1.html"), tracking_uri=uri, run_id=run.info.run_id
    )
    report = write_report(request)
    assert report.url.endswith(f"/runs/{run.info.run_id}/artifacts/report/report.html") and report.note == ""
    assert [a.path for a in client.list_artifacts(run.info.run_id, "report")] == ["report/report.html"]
    stored = client.download_artifacts(run.info.run_id, "report/report.html", str(tmp_path))
    assert Path(stored).read_bytes() == Path(report.html).read_bytes()
    told = client.get_run(run.info.run_id).data.tags["mlflow.note.content"]
    assert f"Run **{document['run']}**" in told and f"[Flow run in Prefect]({document['links']['prefect']})" in told


def test_a_link_that_is_none_is_not_on_the_mlflow_page() -> None:
    assert about({"run": "digits-1", "links": {"prefect": "javascript:alert(1)"}}) == (
        "Run **digits-1**. Its report: Artifacts, report/report.html."
    )


def test_refused_run_shows_the_numbers_that_the_registry_keeps(
    document: dict[str, Any], tmp_path: Path, database: str
) -> None:
    from tasks.mlflow_server import connect

    uri = database
    client = connect(uri)
    experiment = client.create_experiment(tmp_path.name, artifact_location=str(tmp_path / "artifacts"))
    run = client.create_run(experiment)
    document |= {"status": "refused", "message": "digits version 9 may not serve: accuracy 0.9 < 0.95"}
    for name in ("gate", "model_version", "endpoint", "mar_sha256"):
        del document[name]
    request = ReportRequest(document=document, html=str(tmp_path / "r.html"), tracking_uri=uri, run_id=run.info.run_id)
    write_report(request)
    assert "refused by the gate: digits version 9 may not serve" in Path(request.html).read_text()
    sentence = "accuracy 0.9 < 0.95 (gate.minimum, the minimum)"
    decision = {"metric": "accuracy", "value": 0.9, "minimum": 0.95, "sentences": [sentence], "refusals": [sentence]}
    client.create_registered_model("digits")
    source = f"{run.info.artifact_uri}/model"
    client.create_model_version(
        "digits", source, run.info.run_id, tags={"reprise.decision": json.dumps(decision)}, await_creation_for=0
    )
    write_report(request)
    said = Page(Path(request.html).read_text()).text
    assert said.count(sentence) == 2, "in the headline and among the rules"
    assert "not in service" in said and "in every answer" not in said


def test_document_is_not_changed(document: dict[str, Any], files: dict[str, str]) -> None:
    before = copy.deepcopy(document)
    render(ReportRequest(document=document, evaluation=EVALUATION, html="", **files))
    assert document == before
