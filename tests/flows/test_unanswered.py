"""A run that waited for a person when its flow run ended: told once, and never over a run that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.errors import TryAgain
from flows import unanswered
from flows.prefect_api import Prefect
from flows.unanswered import settle
from tasks.records import Store
from tests.flows.test_result_page import DOCUMENT


class Server(Prefect):
    """A Prefect with one flow run, or none."""

    def run(self, flow_run: str) -> dict[str, Any] | None:
        return STATES.get(flow_run)


STATES: dict[str, dict[str, Any]] = {}
PREFECT = Server(url="http://nowhere")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    STATES.clear()
    told: list[str] = []
    monkeypatch.setattr(unanswered, "put", lambda prefect, flow_run, key, *rest: told.append(f"{key}: {rest[2]}"))
    return told


def wait(folder: Path, state: str = "", message: str | None = None, status: str = "waiting") -> Store:
    store = Store(root=str(folder))
    asked = {**DOCUMENT, "status": status, "message": "waits", "links": {"prefect_flow_run": "f1"}}
    store.write("runs/digits-4", asked)
    store.write("waiting/digits-4", {"run": "digits-4"})
    if state:
        STATES["f1"] = {"state": {"type": state, "message": message}}
    return store


@pytest.mark.parametrize(
    ("state", "message", "status", "said"),
    [
        ("CANCELLED", None, "cancelled", "decision; `reprise resume digits-4` asks again"),
        ("FAILED", "The flow was paused and never resumed.", "failed", "(The flow was paused and never resumed);"),
        ("", None, "cancelled", "(its flow run was deleted)"),
    ],
)  # fmt: skip
def test_its_end_is_written_down_once(
    tmp_path: Path, shown: list[str], state: str, message: str | None, status: str, said: str
) -> None:
    store = wait(tmp_path, state, message)
    (told,) = settle(PREFECT, store)
    document = store.read("runs/digits-4") or {}
    assert (document["status"], said in document["message"]) == (status, True), document["message"]
    assert document["ended"] and told == f"digits-4: {document['message']}"
    assert shown == ([f"digits-result: digits: {status}"] if state else [])
    assert settle(PREFECT, store) == [] and store.names("waiting") == []


@pytest.mark.parametrize("state", ["PAUSED", "SCHEDULED", "PENDING", "RUNNING"])
def test_who_still_waits_or_has_been_answered_is_left_alone(tmp_path: Path, shown: list[str], state: str) -> None:
    store = wait(tmp_path, state)
    assert settle(PREFECT, store) == [] and shown == []
    assert (store.read("runs/digits-4") or {})["status"] == "waiting" and store.names("waiting") == ["digits-4"]


def test_a_run_that_goes_on_is_not_looked_at(tmp_path: Path, shown: list[str]) -> None:
    store = wait(tmp_path, "CANCELLED")
    with store.lock("run-digits-4"):
        assert settle(PREFECT, store) == []
    assert (store.read("runs/digits-4") or {})["status"] == "waiting"


def test_one_that_ended_otherwise_is_forgotten(tmp_path: Path, shown: list[str]) -> None:
    store = wait(tmp_path, "COMPLETED", status="succeeded")
    assert settle(PREFECT, store) == []
    assert store.names("waiting") == [] and (store.read("runs/digits-4") or {})["status"] == "succeeded"


def test_a_server_that_is_away_is_asked_again(
    tmp_path: Path, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: Server, flow_run: str) -> None:
        raise TryAgain("Prefect does not answer")

    store = wait(tmp_path)
    monkeypatch.setattr(Server, "run", away)
    with pytest.raises(TryAgain, match="does not answer"):
        settle(PREFECT, store)
    assert (store.read("runs/digits-4") or {})["status"] == "waiting" and store.names("waiting") == ["digits-4"]
