"""plan, trace, who-uses and audit with --place cluster, from outside: which flow is asked for, what its end means here.

Prefect is a fake; the flow itself is in test_ask_flow.py, the real thing in tests/test_cluster_questions.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import Unreachable
from flows import ask as ask_module
from flows import follow as follow_module
from flows.__main__ import main
from flows.ask import ask
from flows.prefect_api import Prefect
from flows.questions import UsesQuestion
from flows.run_mirror import ANSWER
from flows.start import Order
from tests.flows.push_kit import git
from tests.flows.test_cluster_settings import LEAST
from tests.flows.test_settings import GOOD

SHA = "c" * 40
STEP = {"name": "pull_data", "key": "1" * 40, "reused": False, "reason": "first time", "inputs": {}}
PLAN = {
    "pipeline": "digits", "git_sha": SHA, "data_digest": "d" * 32, "data_files": 7, "code_digest": "e" * 64,
    "unchanged": False, "steps": [STEP],
}  # fmt: skip
ATTEMPT = {"number": 1, "cause": "spot", "from_step": 0, "reached_step": 40, "reason": "its node was taken"}
TRACE = {
    "model": "digits", "version": "3", "in_service": True, "gate": "accepted", "metrics": {"accuracy": 0.97},
    "run": "digits-1", "run_id": "f" * 32, "attempt_count": 1, "interruption_count": 1, "data_digest": "d" * 32,
    "code_digest": "e" * 64, "git_sha": SHA, "model_url": "https://mlflow/#/models/digits/versions/3", "gaps": ["none"],
    "attempts": [ATTEMPT],
}  # fmt: skip
USE = {
    "model": "digits", "version": "3", "aliases": ["champion"], "gate": "accepted", "run": "digits-1",
    "run_id": "f" * 32, "git_sha": SHA, "data_digest": "d" * 32,
}  # fmt: skip
FINDING = {"what": "alias champion", "found": "2", "expected": "3"}
AUDIT = {
    "pipeline": "digits", "version": "3", "label": "3.abc", "sha256": "a" * 64, "findings": [FINDING],
    "repaired": True, "clean": True,
}  # fmt: skip
RAISED = "Flow run encountered an exception: "


class Server:
    """A Prefect with the pool, whose flow run has these states, one each time it is asked, and told an answer."""

    def __init__(self, *states: tuple[str, str], answer: dict[str, Any] | None = None) -> None:
        self.states, self.answer = list(states), answer
        self.made: dict[str, Any] = {}
        self.started: dict[str, Any] = {}
        self.set: list[dict[str, Any]] = []
        self.flow = ""
        self.on_look: Callable[[], None] = lambda: None

    def call(self, method: str, path: str, body: Any = None) -> Any:
        if path == "/flows/":
            self.flow = body["name"]
        elif path == "/deployments/":
            self.made = body
        elif path.endswith("/create_flow_run"):
            self.started = body
        elif path.endswith("/set_state"):
            self.set.append(body["state"])
            return {"status": "ACCEPT"}
        elif path == "/artifacts/filter":
            asked = body["artifacts"]["type"]["any_"] == [ANSWER] and self.answer is not None
            return [{"id": "a", "data": json.dumps(self.answer)}] if asked else []
        elif path.startswith("/flow_runs/"):
            self.on_look()
            kind, message = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            return {"id": "f1", "state": {"type": kind, "name": kind.capitalize(), "message": message}}
        return {"id": "x", "type": "kubernetes"}


def reprise(monkeypatch: pytest.MonkeyPatch, server: Server, *arguments: str) -> int:
    monkeypatch.setattr(Prefect, "call", lambda self, *a: server.call(*a))
    try:
        main([*arguments, "--place", "cluster"])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def done(answer: dict[str, Any] | None) -> Server:
    return Server(("SCHEDULED", ""), ("PENDING", ""), ("RUNNING", ""), ("COMPLETED", ""), answer=answer)


ASKED: list[tuple[list[str], dict[str, Any], dict[str, Any], str]] = [
    (
        ["plan", "--rev", "main", "--set", "train.epochs=5"],
        {"kind": "plan", "file": "pipeline.toml", "rev": "SHA", "overrides": ("train.epochs=5",)},
        PLAN,
        "digits at cccccccccccc, data dddddddddddd (7 files)\nstep\t\twhy\tkey\n"
        "pull_data\truns\tfirst time\t111111111111\n\n  reprise run --rev main --place cluster\n",
    ),
    (
        ["trace", "3"],
        {"kind": "trace", "pipeline": "digits", "what": "3"},
        TRACE,
        "digits version 3, in service\ngate       accepted\nmetrics    accuracy 0.97\n"
        f"run        digits-1 (MLflow run {'f' * 32})\nattempts   1, 1 interruptions\ndata       {'d' * 32}\n"
        f"code       {'e' * 64}\ncommit     {SHA}\nMLflow     https://mlflow/#/models/digits/versions/3\n"
        "gap        none\nattempt\tcause\tsteps\treason\n1\tspot\t0-40\tits node was taken\n\n"
        "  reprise show digits-1 --place cluster\n  reprise who-uses dddddddddddd --place cluster\n",
    ),
    (
        ["who-uses", "dddddd"],
        {"kind": "who-uses", "digest": "dddddd"},
        {"uses": [USE]},
        "model\tversion\taliases\tgate\trun\tcommit\tdata\n"
        "digits\t3\tchampion\taccepted\tdigits-1\tcccccccccccc\tdddddddddddd\n\n  reprise trace 3 --place cluster\n",
    ),
    (
        ["audit", "--repair"],
        {"kind": "audit", "pipeline": "digits", "repair": True},
        AUDIT,
        "digits: version 3 (3.abc) in service, repaired\nwhat\tfound\texpected\nalias champion\t2\t3\n",
    ),
]


@pytest.mark.parametrize(("arguments", "question", "answer", "shown"), ASKED, ids=[a[0][0] for a in ASKED])
def test_a_flow_of_the_cluster_is_asked_and_its_answer_shown_as_a_laptop_s(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    question: dict[str, Any],
    answer: dict[str, Any],
    shown: str,
) -> None:
    server = done(answer)
    assert reprise(monkeypatch, server, *arguments) == 0
    rev = {"rev": git(project, "rev-parse", "HEAD")} if question["kind"] == "plan" else {}
    assert server.started["parameters"] == {"question": question | rev}
    assert server.started["name"] == f"digits {question['kind']}"
    assert (server.flow, server.made["name"]) == ("ask", "digits")
    assert server.made["entrypoint"] == "flows.ask_flow.ask_on_cluster" and "concurrency_limit" not in server.made
    env = server.made["job_variables"]["env"]
    assert (env["REPRISE_CLUSTER"], env["REPRISE_GIT"]) == (LEAST, str(project.parent / "digits.git"))
    ours = [line.replace(_command(), "reprise") for line in capsys.readouterr().out.splitlines(keepends=True)]
    assert "".join(ours) == shown
    assert reprise(monkeypatch, done(answer), *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out) == answer.get("uses", answer)


def _command() -> str:
    from flows.display import command_name

    return command_name()


def test_what_is_not_as_it_should_be_is_exit_code_1(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = AUDIT | {"repaired": False, "clean": False}
    assert reprise(monkeypatch, done(found), "audit", "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == found and "`reprise audit --repair --place cluster` makes them" in err
    never = {"pipeline": "digits", "version": "", "label": "", "sha256": "", "findings": [], "repaired": False}
    assert reprise(monkeypatch, done(never | {"clean": True}), "audit") == 0
    assert capsys.readouterr().out == "digits: nothing in service\n"
    assert reprise(monkeypatch, done({"uses": []}), "who-uses", "dddddd") == 0
    assert capsys.readouterr().out == "no model version was trained on data dddddd\n"


ENDS = [
    (("FAILED", f"{RAISED}GiveUp: MLflow at m answered model-versions/get with 404: no version"), 1, "with 404"),
    (("FAILED", f"{RAISED}TryAgain: MLflow at m does not answer"), 1, "MLflow at m does not answer"),
    (("FAILED", f"{RAISED}ConfigError: alias 'a b': expected letters"), 2, "alias 'a b'"),
    (("FAILED", f"{RAISED}PreflightError: /reprise: no folder"), 3, "/reprise: no folder"),
    (("FAILED", f"{RAISED}KeyError: 'x'"), 1, "'x'"),
    (("CRASHED", "its pod is gone"), 1, "its pod is gone; `reprise trace --place cluster` asks again"),
    (("CANCELLED", ""), 130, "cancelled; `reprise trace --place cluster` asks again"),
    (("COMPLETED", ""), 1, "its answer did not come through Prefect"),
]


@pytest.mark.parametrize(("state", "code", "said"), ENDS, ids=[f"{s[0]}-{c}" for s, c, _ in ENDS])
def test_how_the_flow_ends_is_how_the_command_ends(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    state: tuple[str, str],
    code: int,
    said: str,
) -> None:
    assert reprise(monkeypatch, Server(("RUNNING", ""), state), "trace", "9") == code
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and said in err and "Traceback" not in out + err


def test_ctrl_c_cancels_the_flow_and_a_second_one_leaves_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for presses, code in (1, 130), (2, 130):
        left = iter([True] * presses)
        server = Server(("RUNNING", ""), ("RUNNING", ""), ("CANCELLED", ""))

        def press(left: Any = left) -> None:
            if next(left, False):
                raise KeyboardInterrupt

        server.on_look = press
        assert reprise(monkeypatch, server, "audit", "--repair") == code
        (state,) = server.set
        assert (state["type"], state["message"]) == ("CANCELLING", "Cancelled by `reprise audit`.")
        assert "cancelling (Ctrl-C again leaves it)" in capsys.readouterr().out


@pytest.mark.parametrize("before", ["SCHEDULED", "PENDING"])
def test_a_question_that_nobody_takes_is_given_up_and_cancelled(
    project: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    server = Server((before, "why"))
    monkeypatch.setattr(Prefect, "call", lambda self, *a: server.call(*a))
    monkeypatch.setattr(ask_module, "STARTING_SECONDS", 0.03)
    with pytest.raises(Unreachable, match=r"did not begin within 0.03 s, it is .*: why; .*kubectl -n reprise get pods"):
        ask(Order(place="cluster"), UsesQuestion(digest="dddddd"), quiet=True)
    assert [state["type"] for state in server.set] == ["CANCELLING"]


def test_mistakes_are_told_before_a_pod_is_started(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(("RUNNING", ""))
    assert reprise(monkeypatch, server, "who-uses", "abc") == 2
    assert reprise(monkeypatch, server, "plan", "--rev", "nowhere") == 2
    assert reprise(monkeypatch, server, "plan", "--set", "train.epochs=0") == 2
    git(project, "commit", "-q", "--allow-empty", "-m", "not pushed")
    assert reprise(monkeypatch, server, "plan") == 3
    err = capsys.readouterr().err
    assert all(said in err for said in ("data digest 'abc'", "nowhere", "train.epochs", "git push"))
    assert server.started == {}


def test_only_a_plan_needs_the_project_and_its_remote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When those are the trouble, the rest still answers."""
    (tmp_path / "pipeline.toml").write_text(GOOD)
    (tmp_path / "cluster.toml").write_text(LEAST)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(follow_module, "POLL_SECONDS", 0.01)
    server = done(AUDIT)
    assert reprise(monkeypatch, server, "audit") == 0
    assert server.made["job_variables"]["env"]["REPRISE_GIT"] == ""
    assert reprise(monkeypatch, done(PLAN), "plan") == 2
    assert "is in no git repository" in capsys.readouterr().err
