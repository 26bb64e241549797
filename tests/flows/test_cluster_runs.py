"""A cluster's runs as this machine sees them: the last word of each, how one is cancelled. Prefect is a fake here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import ConfigError, GiveUp
from flows.cluster_runs import _workloads, cancel, document, documents
from flows.prefect_api import Prefect
from flows.run_mirror import KIND
from flows.start import Order
from tests.flows.test_cluster_settings import LEAST
from tests.flows.test_settings import GOOD

ORDER = Order(place="cluster")


class Server:
    """Artifacts, newest first, and the states of flow runs."""

    def __init__(self) -> None:
        self.artifacts: list[dict[str, Any]] = []
        self.states: dict[str, str] = {}
        self.set: list[tuple[str, str]] = []

    def add(self, run: str, status: str, flow_run: str, started: float, pipeline: str = "digits") -> None:
        made = {"run": run, "pipeline": pipeline, "status": status, "started": started, "message": ""}
        text = json.dumps({"document": {**made, "links": {"prefect_flow_run": flow_run}}, "line": []})
        self.artifacts.insert(0, {"type": KIND, "data": text})

    def call(self, method: str, path: str, body: Any = None) -> Any:
        if path == "/artifacts/filter":
            if "flow_run_id" in body["artifacts"]:
                return []
            assert body["artifacts"] == {"type": {"any_": [KIND]}} and body["sort"] == "UPDATED_DESC"
            return self.artifacts
        flow_run = path.split("/")[2]
        if path.endswith("/set_state"):
            self.set.append((flow_run, body["state"]["type"]))
            self.states[flow_run] = "CANCELLED"
            return {"status": "ACCEPT"}
        if flow_run not in self.states:
            raise GiveUp("Prefect at http://p answered 404 to GET")
        state = self.states[flow_run]
        return {"id": flow_run, "state": {"type": state, "name": state.capitalize(), "message": "why"}}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    (tmp_path / "pipeline.toml").write_text(GOOD)
    (tmp_path / "cluster.toml").write_text(LEAST)
    monkeypatch.chdir(tmp_path)
    made = Server()
    monkeypatch.setattr(Prefect, "call", lambda self, *a: made.call(*a))
    return made


def test_of_a_run_that_came_twice_the_last_word_counts(server: Server) -> None:
    server.add("digits-1", "failed", "f1", 1.0)
    server.add("other-1", "succeeded", "f2", 2.0, pipeline="other")
    server.add("digits-2", "succeeded", "f3", 3.0)
    server.add("digits-1", "succeeded", "f4", 1.0)
    assert [(d["run"], d["status"]) for d in documents(ORDER)] == [("digits-1", "succeeded"), ("digits-2", "succeeded")]
    assert document(ORDER, "")["run"] == "digits-2"
    with pytest.raises(ConfigError, match="run 'digits-9' is not known; the last runs are: digits-1, digits-2"):
        document(ORDER, "digits-9")


def test_before_the_first_run(server: Server) -> None:
    with pytest.raises(ConfigError, match="reprise run --place cluster"):
        document(ORDER, "")


@pytest.mark.parametrize(
    ("state", "status"), [("RUNNING", "running"), ("CRASHED", "interrupted"), ("CANCELLED", "cancelled")]
)
def test_a_run_whose_flow_has_ended_does_not_run(server: Server, state: str, status: str) -> None:
    server.add("digits-1", "running", "f1", 1.0)
    server.states["f1"] = state
    assert document(ORDER, "digits-1")["status"] == status


@pytest.mark.parametrize(("status", "kind"), [("running", "CANCELLING"), ("waiting", "CANCELLED")])
def test_cancelling(server: Server, status: str, kind: str) -> None:
    server.add("digits-1", status, "f1", 1.0)
    server.states["f1"] = "RUNNING"
    assert cancel(ORDER, "digits-1")["status"] == "cancelled"
    assert server.set == [("f1", kind)]
    with pytest.raises(GiveUp, match="digits-1 is cancelled: nothing to cancel"):
        cancel(ORDER, "")


def test_names_of_what_ran() -> None:
    steps = [{"name": name, "key": name[:1] * 40} for name in ("pull_data", "train_model")]
    found = {"run": "digits-7", "steps": steps, "attempts": [{"number": 1}, {"number": 2}], "resumed": 1}
    assert _workloads(found, "pull_data") == ["pull-data-pppppppppppp-7"]
    assert _workloads(found, "train_model") == ["train-tttttttttttt-1", "train-tttttttttttt-2"]
    assert _workloads(found, "write_report") == [f"write-report-digits-7-{which}" for which in ("0", "1", "done")]
