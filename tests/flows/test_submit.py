"""`reprise run --place cluster` from the user's machine: what is refused, what is asked for, how each end is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import ConfigError, GateRefused, GiveUp, PreflightError, StepError, TryAgain, Unreachable
from flows import follow as follow_module
from flows.execute import Interrupted
from flows.plan import STEPS
from flows.prefect_api import Prefect
from flows.run_mirror import KIND
from flows.start import Order
from flows.submit import submit
from flows.zombies import SILENCE
from tests.flows.push_kit import git
from tests.flows.test_cluster_settings import LEAST


class Server:
    """A Prefect whose flow run does what the test says, a state each time it is asked. A fake."""

    def __init__(self, *states: tuple[str, str], document: dict[str, Any] | None = None, pool: str = "kubernetes"):
        self.states, self.document, self.pool = list(states), document, pool
        self.made: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}
        self.set: list[str] = []
        self.on_look = lambda: None
        self.refusing: StepError | None = None

    def call(self, method: str, path: str, body: Any = None) -> Any:
        if path == "/work_pools/reprise":
            if not self.pool:
                raise GiveUp("Prefect answered 404 to GET")
            return {"name": "reprise", "type": self.pool}
        if path == "/work_pools/filter":
            if self.refusing:
                raise self.refusing
            return []
        if path == "/deployments/":
            self.made = body
        if path.endswith("/create_flow_run"):
            self.asked = body
        if path.endswith("/set_state"):
            self.set.append(body["state"]["type"])
            return {"status": "ACCEPT"}
        if path == "/artifacts/filter":
            data = json.dumps({"document": self.document, "line": []})
            return [{"id": "a", "type": KIND, "data": data}] if self.document else []
        if path.startswith("/flow_runs/"):
            self.on_look()
            kind, message = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            if kind == "AWAY":
                raise TryAgain("Prefect does not answer")
            return {"id": "f1", "state": {"type": kind, "name": kind.capitalize(), "message": message}}
        return {"id": "d1"}


def asked(monkeypatch: pytest.MonkeyPatch, server: Server, *, detach: bool = False, **order: Any) -> dict[str, Any]:
    monkeypatch.setattr(Prefect, "call", lambda self, *a: server.call(*a))
    return submit(Order(place="cluster", **order), detach=detach, quiet=True)


def document(status: str = "succeeded", **more: Any) -> dict[str, Any]:
    steps = [{"name": n, "status": "done", "reason": "", "seconds": 1.0} for n in STEPS]
    return {"run": "digits-1", "status": status, "steps": steps, "attempts": [], **more}


def test_a_run_is_asked_for_at_its_commit_and_followed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(("SCHEDULED", ""), ("PENDING", ""), ("AWAY", ""), ("RUNNING", ""), ("COMPLETED", ""))
    server.document = document()
    assert asked(monkeypatch, server, overrides=("train.epochs=5",)) == server.document
    sha = git(project, "rev-parse", "HEAD")
    assert server.asked["parameters"] == {"rev": sha, "overrides": ["train.epochs=5"], "cause": "command"}
    variables = server.made["job_variables"]
    assert variables["env"]["REPRISE_GIT"] == str(project.parent / "digits.git")
    assert variables["env"]["REPRISE_CLUSTER"] == LEAST
    assert (server.made["work_pool_name"], server.made["parameters"]["pipeline"]) == ("reprise", "pipeline.toml")


def test_left_to_itself(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = asked(monkeypatch, Server(("RUNNING", "")), detach=True)
    assert answer["links"]["prefect"].endswith("/runs/flow-run/d1")


def test_a_commit_that_is_not_pushed_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(project, "commit", "-q", "--allow-empty", "-m", "y")
    server = Server(("RUNNING", ""))
    with pytest.raises(PreflightError, match=r"commit \w{7} is on no branch of .*: git push"):
        asked(monkeypatch, server)
    assert server.asked == {}
    git(project, "remote", "remove", "origin")
    with pytest.raises(ConfigError, match="no remote `origin`"):
        asked(monkeypatch, server)


@pytest.mark.parametrize(("pool", "said"), [("", "there is none"), ("process", "it is of type process")])
def test_a_pool_that_is_not_there(project: Path, monkeypatch: pytest.MonkeyPatch, pool: str, said: str) -> None:
    with pytest.raises(PreflightError, match=f"work pool 'reprise'.*{said}; expected"):
        asked(monkeypatch, Server(("RUNNING", ""), pool=pool))


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (TryAgain("Prefect at X does not answer: refused; start it: reprise up"), Unreachable, "port-forward"),
        (GiveUp("Prefect at X answered 401 to POST"), PreflightError, "PREFECT_API_AUTH_STRING"),
        (GiveUp("Prefect at X answered 404 to POST"), GiveUp, "answered 404"),
    ],
)
def test_a_prefect_that_does_not_let_us_in(
    project: Path, monkeypatch: pytest.MonkeyPatch, answer: StepError, kind: type[StepError], said: str
) -> None:
    server = Server(("RUNNING", ""))
    server.refusing = answer
    with pytest.raises(kind, match=said) as caught:
        asked(monkeypatch, server)
    assert "reprise up" not in str(caught.value)


def test_a_step_whose_flow_is_moved_is_not_called_cancelled(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for status, shown in (("interrupted", False), ("cancelled", True)):
        server = Server(("RUNNING", ""), ("CANCELLED", ""), document=document(status))
        assert server.document is not None
        server.document["steps"][0]["status"] = "cancelled"
        monkeypatch.setattr(Prefect, "call", lambda self, *a, server=server: server.call(*a))
        with pytest.raises(Interrupted):
            submit(Order(place="cluster"))
        assert ("pull_data       cancelled" in capsys.readouterr().out) is shown


def test_no_spot_market_is_played(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--interrupt kill@20%: only a laptop"):
        asked(monkeypatch, Server(("RUNNING", "")), interruptions=("kill@20%",))


ENDS: list[tuple[tuple[str, str], dict[str, Any] | None, type[StepError], str]] = [
    (("FAILED", "?"), document("refused", error="GateRefused", message="too bad"), GateRefused, "too bad"),
    (("FAILED", "?"), document("failed", error="PreflightError", message="no image"), PreflightError, "no image"),
    (("FAILED", "?"), document("failed", error="ZeroDivisionError", message="oh"), GiveUp, "oh"),
    (("FAILED", "Flow run encountered an exception: ConfigError: no URL"), None, ConfigError, "no URL"),
    (("FAILED", "something else"), None, GiveUp, "something else"),
    (("CRASHED", "gone"), document("running"), TryAgain, "digits-1: its flow crashed: gone"),
    (("CANCELLED", ""), document("cancelled"), Interrupted, "digits-1: cancelled"),
]


@pytest.mark.parametrize(("state", "seen", "kind", "said"), ENDS, ids=lambda v: getattr(v, "__name__", None))
def test_how_a_run_ends_is_how_the_command_ends(
    project: Path, monkeypatch: pytest.MonkeyPatch, state: tuple[str, str], seen: Any, kind: type[StepError], said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        asked(monkeypatch, Server(("RUNNING", ""), state, document=seen))
    assert caught.value.exit_code == kind.exit_code


def test_a_cancel_that_prefect_was_too_busy_to_note(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module, "STOPPED_SECONDS", 0.0)
    server = Server(("CANCELLING", ""), ("CANCELLING", ""), ("CANCELLED", ""), document=document("running"))
    with pytest.raises(Interrupted):
        asked(monkeypatch, server)
    assert server.set == [], "its steps may still be stopping"
    server = Server(("CANCELLING", ""), ("CANCELLING", ""), ("CANCELLED", ""), document=document("cancelled"))
    with pytest.raises(Interrupted):
        asked(monkeypatch, server)
    assert set(server.set) == {"CANCELLED"}


def test_a_silent_flow_is_waited_for(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = ("CRASHED", f"{SILENCE} 90 s: its process is gone.")
    server = Server(("RUNNING", ""), silent, silent, ("RUNNING", ""), silent, ("COMPLETED", ""), document=document())
    assert asked(monkeypatch, server)["run"] == "digits-1"
    monkeypatch.setattr(follow_module, "SILENT_SECONDS", 0.05)
    with pytest.raises(TryAgain, match="its flow crashed"):
        asked(monkeypatch, Server(silent, document=document()))


def test_ctrl_c_cancels_and_a_second_one_leaves(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(("RUNNING", ""), ("RUNNING", ""), ("CANCELLED", ""), document=document("cancelled"))
    presses = iter([True, False, False])

    def press() -> None:
        if next(presses, False):
            raise KeyboardInterrupt

    server.on_look = press
    with pytest.raises(Interrupted):
        asked(monkeypatch, server)
    assert server.set == ["CANCELLING"]
    server = Server(("RUNNING", ""), document=document())
    presses = iter([True, True])
    server.on_look = press
    with pytest.raises(KeyboardInterrupt):
        asked(monkeypatch, server)


def test_prefect_away_for_too_long(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module, "AWAY_SECONDS", 0.05)
    with pytest.raises(TryAgain, match="the run goes on in the cluster"):
        asked(monkeypatch, Server(("AWAY", "")))
