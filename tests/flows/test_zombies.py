"""Flows that died: the decision for each kind of sighting, and one look over a Prefect that only remembers."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from deployments.errors import TryAgain
from flows.prefect_api import Prefect
from flows.prefect_start import flow_lock
from flows.zombies import FORGOTTEN_SECONDS, RETURNS, SILENCE, YOUNG_SECONDS, Sighting, judge, sweep
from tasks.records import Store

DEAD: dict[str, Any] = {
    "state": "RUNNING",
    "age_seconds": 40.0,
    "alive": False,
    "unheard": False,
    "known": True,
    "unfinished": True,
    "interrupted": False,
    "deployed": True,
    "revivals": 0,
}


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        ({}, "resume"),
        ({"alive": True}, "leave"),
        ({"alive": True, "state": "CRASHED"}, "leave"),
        ({"alive": True, "unheard": True, "state": "CRASHED"}, "correct"),  # the server was away, not the flow
        ({"age_seconds": 3.0}, "resume"),  # it had begun its run: nothing to wait for
        ({"age_seconds": 1.0}, "leave"),
        ({"age_seconds": 3.0, "known": False, "unfinished": False}, "leave"),  # it may be importing still
        ({"age_seconds": YOUNG_SECONDS["RUNNING"] + 1, "known": False, "unfinished": False}, "resume"),
        ({"revivals": 1}, "mark"),
        ({"deployed": False}, "mark"),
        ({"state": "PENDING", "age_seconds": 40.0}, "leave"),
        ({"state": "PENDING", "age_seconds": 121.0}, "resume"),
        ({"state": "CANCELLING"}, "cancel"),
        ({"state": "CANCELLING", "age_seconds": 5.0}, "leave"),
        ({"state": "CRASHED"}, "resume"),
        ({"state": "CRASHED", "revivals": 1}, "leave"),
        ({"state": "CRASHED", "interrupted": True, "revivals": 5}, "resume"),  # it saved: nothing speaks against it
        ({"state": "CRASHED", "interrupted": True, "revivals": RETURNS}, "leave"),
        ({"state": "CRASHED", "deployed": False}, "leave"),
        ({"state": "CRASHED", "unfinished": False}, "leave"),  # somebody resumed or cancelled it
        ({"state": "CRASHED", "known": False, "unfinished": False}, "resume"),
        ({"state": "CRASHED", "age_seconds": FORGOTTEN_SECONDS + 1}, "leave"),
        ({"state": "COMPLETED"}, "leave"),
        ({"state": "PAUSED"}, "leave"),  # it waits for a person: nobody has to be alive
        ({"state": "SCHEDULED"}, "leave"),
    ],
)
def test_verdict(seen: dict[str, Any], verdict: str) -> None:
    assert judge(Sighting(**{**DEAD, **seen})) == verdict


class Remembering(Prefect):
    """Flow runs in a list instead of a server; a fake."""

    found: ClassVar[list[dict[str, Any]]] = []
    moves: ClassVar[list[tuple[str, str, bool]]] = []

    def runs(self, *, states: list[str], deployment: str = "", tags: list[str] | None = None) -> list[dict[str, Any]]:
        return [r for r in self.found if r["state"]["type"] in states]

    def set_state(self, flow_run: str, kind: str, name: str, message: str, *, force: bool = False) -> bool:
        self.moves.append((flow_run, name, force))
        return True


@pytest.fixture
def prefect() -> Prefect:
    Remembering.found, Remembering.moves = [], []
    return Remembering(url="http://nowhere")


def flow_run(
    name: str, *, state: str = "RUNNING", deployment: str | None = "d1", age: float = 300, message: str | None = None
) -> None:
    when = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)).isoformat()
    now = {"type": state, "timestamp": when, "message": message}
    Remembering.found.append({"id": name, "name": name, "deployment_id": deployment, "state": now})


def document(store: Store, run: str, flow: str, status: str = "running") -> None:
    store.write(f"flow-runs/{flow}", {"run": run})
    store.write(f"runs/{run}", {"run": run, "status": status, "process": 1})


def test_a_dead_one_is_marked_and_resumed_once(tmp_path: Path, prefect: Prefect) -> None:
    store = Store(root=str(tmp_path))
    document(store, "digits-1", "f1")
    flow_run("f1")
    assert sweep(prefect, store, "d1") == ["f1: its process died; resumed"]
    # Only the orchestrated transition gives the concurrency slot back; leaving a final state needs force.
    assert Remembering.moves == [("f1", "Crashed", False), ("f1", "AwaitingRetry", True)]
    assert sweep(prefect, store, "d1") == ["f1: its process died; marked as crashed"]


def test_what_prefect_marked_already_is_only_resumed(tmp_path: Path, prefect: Prefect) -> None:
    store = Store(root=str(tmp_path))
    document(store, "digits-1", "f1")
    flow_run("f1", state="CRASHED")
    sweep(prefect, store, "d1")
    sweep(prefect, store, "d1")
    assert Remembering.moves == [("f1", "AwaitingRetry", True)]


def test_a_living_one_is_left_alone_though_prefect_lost_sight_of_it(tmp_path: Path, prefect: Prefect) -> None:
    store = Store(root=str(tmp_path))
    document(store, "digits-1", "f1")
    flow_run("f1", state="CRASHED")
    flow_run("f2")
    program = (
        "import sys; from tasks.records import Store\n"
        "store = Store(root=sys.argv[1])\n"
        "with store.lock(sys.argv[2]), store.lock(sys.argv[3]): print(flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", program, str(tmp_path), flow_lock("f1"), flow_lock("f2")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "\n"
        assert sweep(prefect, store, "d1") == []
        flow_run("f1", state="CRASHED", message=f"{SILENCE} 90 s: its process is gone.")
        assert sweep(prefect, store, "d1") == ["f1: lives, though its heartbeats were not heard; running again"]
        assert Remembering.moves == [("f1", "Running", True)]
        Remembering.found.pop()
        holder.kill()
    assert len(sweep(prefect, store, "d1")) == 2, "the locks died with their process"


def test_one_that_ended_in_order_is_resumed_each_time(tmp_path: Path, prefect: Prefect) -> None:
    """`reprise down` twice, or Prefect taking a slot back twice: its trainer saved, and it goes on."""
    store = Store(root=str(tmp_path))
    document(store, "digits-1", "f1", status="interrupted")
    flow_run("f1", state="CRASHED")
    for _ in range(3):
        assert sweep(prefect, store, "d1") == ["f1: it was interrupted; resumed"]
    document(store, "digits-1", "f1")
    assert sweep(prefect, store, "d1") == ["f1: its process died; resumed"], "counted apart"
    assert sweep(prefect, store, "d1") == []


def test_runs_of_another_project_on_the_same_server_are_none_of_ours(tmp_path: Path, prefect: Prefect) -> None:
    flow_run("theirs", deployment="d2")
    flow_run("their command", deployment=None)
    assert sweep(prefect, Store(root=str(tmp_path)), "d1") == []


def test_a_run_of_the_command_is_marked(tmp_path: Path, prefect: Prefect) -> None:
    store = Store(root=str(tmp_path))
    document(store, "digits-1", "f1")
    flow_run("f1", deployment=None)
    assert sweep(prefect, store, "d1") == ["f1: its process died; marked as crashed"]
    assert Remembering.moves == [("f1", "Crashed", False)]


def test_one_that_was_cancelled_while_it_was_dead(tmp_path: Path, prefect: Prefect) -> None:
    store = Store(root=str(tmp_path))
    document(store, "digits-1", "f1")
    flow_run("f1", state="CANCELLING")
    assert sweep(prefect, store, "d1") == ["f1: was gone when it was cancelled"]
    assert Remembering.moves == [("f1", "Cancelled", False)]


def test_the_resumption_is_counted_before_it_is_asked_for(tmp_path: Path, prefect: Prefect) -> None:
    """Killed, or refused, between the two it is not resumed twice."""

    class Failing(Remembering):
        def set_state(self, flow_run: str, kind: str, name: str, message: str, *, force: bool = False) -> bool:
            if name == "AwaitingRetry":
                raise TryAgain("away")
            return super().set_state(flow_run, kind, name, message, force=force)

    store = Store(root=str(tmp_path))
    document(store, "digits-1", "f1")
    flow_run("f1", state="CRASHED")
    with pytest.raises(TryAgain):
        sweep(Failing(url="x"), store, "d1")
    assert sweep(prefect, store, "d1") == []
