"""The report: what it says of each kind of run, that it needs nothing but itself, and bad documents."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import GiveUp
from tasks import report_page as page
from tasks import report_timeline, report_words
from tasks.report_charts import Mark, Piece, loss_curve, pieces_of
from tasks.write_report import ReportRequest, read_lines, render, write_report

T0 = 1795507200.0
NAMES = ("pull_data", "train_model", "register_model", "package_model", "deploy_model", "check_endpoint")


def attempt(number: int, started: float, ended: float, cause: str, steps: tuple[int, int, int], **more: Any) -> Any:
    row = {"number": number, "started": started, "ended": ended, "cause": cause, "from_step": steps[0]}
    row |= {"to_step": steps[1], "reached_step": steps[2], "idle_seconds": 0.0, "notice_to_saved": None}
    return row | {"capacity": "spot", "node": ""} | more


@pytest.fixture
def document() -> dict[str, Any]:
    """A run that was interrupted twice and ended well."""
    steps = [
        {"name": n, "key": f"{i}" * 40, "status": "done", "reused": False, "reason": "first run", "seconds": 5.0}
        | {"started": T0 + 10 * i, "ended": T0 + 10 * i + 9}
        for i, n in enumerate(NAMES)
    ]
    attempts = [
        attempt(1, T0 + 10, T0 + 12, "spot", (0, 40, 40), notice_to_saved=0.2134),
        attempt(2, T0 + 13, T0 + 15, "spot", (40, 70, 90), idle_seconds=1.0),
        attempt(3, T0 + 16, T0 + 19, "complete", (70, 200, 200), idle_seconds=1.0),
    ]
    return {
        "run": "digits-1",
        "pipeline": "digits",
        "status": "succeeded",
        "message": "",
        "cause": "command",
        "place": "laptop",
        "git_sha": "7f3a9c0d" * 5,
        "code_digest": "c" * 64,
        "data_digest": "d" * 32 + ".dir",
        "started": T0,
        "ended": T0 + 62,
        "steps": steps,
        "attempts": attempts,
        "model_version": "3",
        "mar_sha256": "e" * 64,
        "endpoint": "http://127.0.0.1:8080/predictions/digits",
        "metrics": {},
        "links": {"prefect": "http://127.0.0.1:4200/runs/1", "model": "javascript:alert(1)"},
        "gate": {
            "metric": "accuracy",
            "value": 0.97777,
            "minimum": 0.95,
            "higher_is_better": True,
            "sentences": ["accuracy 0.97777 >= 0.95 (gate.minimum, the minimum)"],
            "refusals": [],
        },
    }


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The trainer's progress over three attempts, and held-out answers with two mistakes."""
    lines: list[str] = []
    for first, last, began in ((0, 90, 10.5), (70, 200, 16.5)):
        for step in range(first + 1, last + 1):
            when = T0 + began + (step - first) * 0.02 + (2.0 if first == 0 and step > 40 else 0)
            lines.append(json.dumps({"step": step, "max_steps": 200, "loss": 2.0 / step, "time": when}))
    lines += [json.dumps({"event": "saved", "step": 40, "time": T0 + 12}), '{"step": 201, "lo']
    progress = tmp_path / "progress.jsonl"
    progress.write_text("\n".join(lines))
    answers = [(i % 3, i % 3) for i in range(28)] + [(0, 2), (1, 2)]
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps({"label": a, "answer": {"label": b}}) + "\n" for a, b in answers))
    return {"progress": str(progress), "heldout": str(heldout)}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow's own SQLite store, without a server."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


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


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, "Trained through 2 interruptions, 20 steps lost, accuracy 0.9778 ≥ 0.95, version 3 in service."),
        (
            {"attempts": [attempt(1, T0, T0 + 5, "complete", (0, 9, 9))]},
            "Trained without an interruption, accuracy 0.9778 ≥ 0.95, version 3 in service.",
        ),
        (
            {"status": "refused", "gate": {"metric": "accuracy", "value": 0.9, "refusals": ["accuracy 0.9 < 0.95"]}},
            "Trained through 2 interruptions, 20 steps lost, refused by the gate: accuracy 0.9 < 0.95.",
        ),
        (
            {"gate": {"metric": "loss", "value": 0.2, "minimum": 0.5, "higher_is_better": False}},
            "Trained through 2 interruptions, 20 steps lost, loss 0.2 ≤ 0.5, version 3 in service.",
        ),
        (
            {"status": "failed", "message": "no disk.", "steps": [{"name": "deploy_model", "status": "failed"}]},
            "Failed at deploy_model: no disk.",
        ),
        ({"status": "cancelled", "steps": []}, "Cancelled."),
        (
            {"status": "unchanged", "steps": [{"name": "train_model", "reused": True}]},
            "Training reused, accuracy 0.9778 ≥ 0.95, version 3 in service.",
        ),
    ],
)
def test_one_sentence(document: dict[str, Any], change: dict[str, Any], sentence: str) -> None:
    assert page.summary(document | change) == sentence


def test_timeline_is_in_percent_and_marks_what_was_reused(document: dict[str, Any]) -> None:
    document["steps"][0].update(reused=True, status="reused", started=None, ended=None, reason="data unchanged")
    shown = report_timeline.timeline(document)
    pull, train, *_, check = shown["rows"]
    assert (pull["status"], pull["bars"], pull["reason"], pull["length"]) == ("reused", [], "data unchanged", "")
    assert [b["kind"] for b in train["bars"]] == ["idle", "cut", "cut", "work"]
    assert train["bars"][0]["left"] == 0 and check["bars"][0]["left"] + check["bars"][0]["width"] == pytest.approx(100)
    for row in shown["rows"]:
        for bar in row["bars"]:
            assert 0 <= bar["left"] <= 100 and 0 < bar["width"] <= 100 - bar["left"] + 1e-6
    assert [t["text"] for t in shown["ticks"]] == ["0", "10 s", "20 s", "30 s", "40 s"]
    assert report_timeline.timeline({"steps": []})["ticks"] == []


@pytest.mark.parametrize("span", [0.2, 3, 61, 599, 3700, 90000, 2_000_000])
def test_ticks_are_few_and_round(document: dict[str, Any], span: float) -> None:
    document["steps"] = [{"name": "train_model", "started": T0, "ended": T0 + span, "status": "done"}]
    ticks = report_timeline.timeline(document | {"attempts": []})["ticks"]
    assert ticks[0] == {"left": 0.0, "text": "0"}
    assert span > 500_000 or 2 <= len(ticks) <= 6
    assert all(t["left"] <= 94 for t in ticks)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0, "0.0 ms"),
        (0.0041, "4.1 ms"),
        (0.213, "213 ms"),
        (0.9996, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3725, "1 h 02 min"),
        (90000, "1 d 01 h"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert report_words.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.977777, "0.9778"), (360.0, "360"), (12345, "12\u202f345"), (float("nan"), "nan"), (None, "–"), (1e-7, "1e-07")],
)
def test_numbers(value: Any, text: str) -> None:
    assert report_words.number(value) == text


def test_confusion_is_for_classes_only() -> None:
    assert page.confusion([]) is None
    assert page.confusion([{"label": 1.5, "answer": {"label": 1.4}}]) is None, "a regression has no classes"
    assert page.confusion([{"label": i, "answer": {"label": i}} for i in range(21)]) is None, "too many to read"
    assert page.confusion([{"label": 1}]) is None
    table = page.confusion([{"label": i % 11, "answer": {"label": i % 11}} for i in range(22)])
    assert table is not None and table["names"] == [str(i) for i in range(11)], "by number, not by letter"
    words = page.confusion([{"label": "dog", "answer": {"label": "cat"}}])
    assert words is not None and (words["names"], words["wrong"]) == (["cat", "dog"], 1)


def test_losses_belong_to_the_attempt_that_wrote_them(document: dict[str, Any], files: dict[str, str]) -> None:
    first, second, third = pieces_of(read_lines(files["progress"]), document["attempts"])
    assert (first.steps[0], first.steps[-1]) == (1, 40)
    assert (second.steps[0], second.steps[-1], second.kept) == (41, 90, 70)
    assert (third.steps[0], third.steps[-1]) == (71, 200)
    broken = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": None}, {"event": "saved", "step": 3}]
    assert pieces_of(broken, []) == [] and pieces_of(broken, document["attempts"]) == []


def test_curve_has_the_pages_colours_and_few_points() -> None:
    count = 200_000
    progress = [{"step": i, "loss": 1 + 1 / (i + 1), "time": float(i)} for i in range(count)]
    (piece,) = pieces_of(progress, [])
    assert len(piece.steps) < 3100 and piece.steps[-1] == count - 1
    svg = loss_curve([piece], [Mark(step=500, number=1), Mark(step=600, number=2)], width=920, height=300, label="<x>")
    assert svg.startswith("<svg viewBox=") and svg.endswith("</svg>") and len(svg) < 200_000
    assert "var(--accent)" in svg and "var(--interruption)" in svg and "#0a0b" not in svg
    assert 'aria-label="&lt;x&gt;"' in svg and "<style" not in svg and "<metadata" not in svg


def test_only_a_loss_that_came_out_otherwise_is_dashed() -> None:
    first = Piece(steps=list(range(60)), losses=[1.0] * 60, kept=40)
    same = Piece(steps=list(range(41, 90)), losses=[1.0] * 49)
    other = Piece(steps=list(range(41, 90)), losses=[2.0] * 49)
    size = {"width": 360, "height": 240, "label": "loss"}
    assert "stroke-dasharray" not in loss_curve([first, same], [], **size)
    assert "stroke-dasharray" in loss_curve([first, other], [], **size)


def test_curve_without_points_or_of_one_point_is_drawn() -> None:
    assert "<svg" in loss_curve([Piece(steps=[1], losses=[0.5])], [], width=360, height=240, label="loss")
    assert "<svg" in loss_curve([Piece(steps=[1, 2], losses=[-1.0, 0.0], kept=0)], [], width=360, height=240, label="l")


def test_document_is_not_changed(document: dict[str, Any], files: dict[str, str]) -> None:
    before = copy.deepcopy(document)
    render(ReportRequest(document=document, evaluation=EVALUATION, html="", **files))
    assert document == before


def test_an_attempt_without_a_node_is_no_error_and_a_fallback_is_told() -> None:
    attempts = [
        attempt(1, T0, T0 + 9, "no_capacity", (0, 0, 0), reason="no node within 9 s", asked="spot first"),
        attempt(2, T0 + 9, T0 + 20, "complete", (0, 40, 40), capacity="on-demand", node="n1", asked="got no spot node"),
    ]
    assert page.summary({"status": "succeeded", "attempts": attempts}).startswith("Trained without an interruption")
    waited, done = report_timeline.attempt_rows(attempts)
    assert (waited["cause"], waited["kind"], waited["mark"]) == ("no capacity", "warn", 0)
    assert (waited["where"], done["where"]) == ("spot (spot first)", "on-demand n1 (got no spot node)")
