"""The run's document as it is seen through Prefect: written when it changes, by whichever pod runs the flow."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.errors import TryAgain
from flows import run_mirror
from flows.prefect_api import Prefect
from flows.run_mirror import KIND, mirrored, read_mirror


class Artifacts:
    """The three routes, kept in memory. A fake; tests/test_cluster_chain.py has the real server."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[str, str]] = []
        self.away = False

    def call(self, prefect: Prefect, method: str, path: str, body: Any = None) -> Any:
        self.calls.append((method, path))
        if self.away:
            raise TryAgain("away")
        if path == "/artifacts/filter":
            wanted = body["artifacts"]["flow_run_id"]["any_"]
            return [a for a in self.kept.values() if a["flow_run_id"] in wanted and a["type"] == KIND]
        if method == "POST":
            made = {"id": f"a{len(self.kept)}", **body}
            self.kept[made["id"]] = made
            return made
        self.kept[path.rpartition("/")[2]] |= body
        return None


@pytest.fixture
def artifacts(monkeypatch: pytest.MonkeyPatch) -> Artifacts:
    made = Artifacts()
    monkeypatch.setattr(Prefect, "call", lambda self, *a: made.call(self, *a))
    monkeypatch.setattr(run_mirror, "SECONDS", 0.02)
    return made


def a_run() -> Any:
    return SimpleNamespace(document={"status": "running"}, urls={"prefect": "http://p"}, on_event=lambda k, f: None)


def test_what_is_written_is_what_is_read(artifacts: Artifacts) -> None:
    run, prefect = a_run(), Prefect(url="http://p")
    assert read_mirror(prefect, "f1") is None
    with mirrored(run, "f1"):
        run.on_event("line", {"step": "train_model", "line": "half"})
        run.document["status"] = "succeeded"
    assert read_mirror(prefect, "f1") == {"document": {"status": "succeeded"}, "line": ["train_model", "half"]}
    assert read_mirror(prefect, "f2") is None


def test_a_document_that_stays_as_it_is_costs_nothing(artifacts: Artifacts) -> None:
    with mirrored(a_run(), "f1"):
        time.sleep(0.2)
        quiet = len(artifacts.calls)
        time.sleep(0.2)
        assert len(artifacts.calls) == quiet == 2  # looked for one, made one


def test_the_next_pod_of_the_flow_run_goes_on_with_its_artifact(artifacts: Artifacts) -> None:
    for status in ("interrupted", "succeeded"):
        run = a_run()
        with mirrored(run, "f1"):
            run.document["status"] = status
    (only,) = artifacts.kept.values()
    assert json.loads(only["data"])["document"] == {"status": "succeeded"}


def test_prefect_away_costs_the_view_and_not_the_run(artifacts: Artifacts, tmp_path: Path) -> None:
    run = a_run()
    artifacts.away = True
    with mirrored(run, "f1"):
        time.sleep(0.1)
        artifacts.away = False
        run.document["status"] = "succeeded"
    seen = read_mirror(Prefect(url="http://p"), "f1")
    assert seen is not None and seen["document"]["status"] == "succeeded"


def test_what_the_body_raises_is_raised_and_written(artifacts: Artifacts) -> None:
    run = a_run()
    before = run.on_event
    with pytest.raises(ValueError, match="no"), mirrored(run, "f1"):
        run.document["status"] = "failed"
        raise ValueError("no")
    seen = read_mirror(Prefect(url="http://p"), "f1")
    assert seen is not None and seen["document"]["status"] == "failed" and run.on_event is before
