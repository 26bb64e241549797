"""`reprise rollback --place cluster` from outside: which flow is asked for, what comes back. Prefect is a fake here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import GiveUp
from flows import follow as follow_module
from flows.prefect_api import Prefect
from flows.rollback import rollback
from flows.run_mirror import ANSWER
from flows.start import Order
from tests.flows.test_cluster_settings import LEAST
from tests.flows.test_settings import GOOD

SAID = {"pipeline": "digits", "was": "4", "version": "3", "previous": "4", "url": "http://s"}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    (tmp_path / "pipeline.toml").write_text(GOOD + '[serve]\nsoak = "3s"\n')
    (tmp_path / "cluster.toml").write_text(LEAST)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(follow_module, "POLL_SECONDS", 0.01)
    return []


def answering(calls: list[tuple[str, Any]], state: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: Prefect, method: str, path: str, body: Any = None) -> Any:
        calls.append((path, body))
        if path == "/artifacts/filter":
            wanted = body["artifacts"]["type"]["any_"]
            return [{"id": "a", "data": json.dumps(SAID)}] if wanted == [ANSWER] else []
        return {"id": "x", "type": "kubernetes", "state": {"name": "S", **state}}

    monkeypatch.setattr(Prefect, "call", call)


def test_a_flow_of_the_cluster_does_it(calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    answering(calls, {"type": "COMPLETED"}, monkeypatch)
    assert rollback(Order(place="cluster"), "3") == SAID
    made, asked = dict(calls)["/deployments/"], dict(calls)["/deployments/x/create_flow_run"]
    assert (made["name"], made["entrypoint"]) == ("digits", "flows.rollback_flow.rollback_on_cluster")
    assert (made["parameters"]["soak"], asked["parameters"]) == (3.0, {"to": "3"})
    assert made["job_variables"]["env"]["REPRISE_CLUSTER"] == LEAST


def test_what_it_refuses_is_said(calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    message = "Flow run encountered an exception: GiveUp: digits: version 9 was never in service"
    answering(calls, {"type": "FAILED", "message": message}, monkeypatch)
    with pytest.raises(GiveUp, match=r"^digits: version 9 was never in service$"):
        rollback(Order(place="cluster"), "9")
