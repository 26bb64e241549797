"""The pause before a rollout: when it is asked for, what an answer does, and that it is asked for once."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.errors import GateRefused
from flows import approval
from flows.approval import Approval, approved
from flows.settings import load_pipeline
from tasks.records import Store
from tests.flows.test_settings import GOOD


class Run:
    """What approval needs of a run; a fake."""

    def __init__(self, folder: Path, *, on: bool = True, reused: bool = False) -> None:
        text = GOOD + ("[deploy]\napproval = true\n" if on else "")
        step = SimpleNamespace(key="k" * 40, reused=reused)
        self.plan = SimpleNamespace(pipeline=load_pipeline(text), steps={"deploy_model": step})
        self.store, self.id = Store(root=str(folder)), "digits-1"
        self.document: dict[str, Any] = {"status": "running", "attempts": [], "overrides": [], "links": {}}
        self.urls = {"prefect": "http://p"}

    def update(self, **fields: Any) -> None:
        self.document.update(fields)

    def event(self, kind: str, **fields: Any) -> None:
        """Nobody watches."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Approval]:
    """The answers that a person will give; taken from the end."""
    answers: list[Approval] = []

    async def ask(*_: object) -> Approval:
        return answers.pop()

    monkeypatch.setattr(approval, "_ask", ask)
    return answers


def decide(run: Run, version: str = "3") -> None:
    asyncio.run(approved(run, SimpleNamespace(version=version)))  # type: ignore[arg-type]


def test_nobody_is_asked_where_nobody_wants_it_or_nothing_is_deployed(tmp_path: Path, asked: list[Approval]) -> None:
    decide(Run(tmp_path, on=False))
    decide(Run(tmp_path, reused=True))


def test_a_yes_is_kept_and_not_asked_for_again(tmp_path: Path, asked: list[Approval]) -> None:
    asked.append(Approval(decision="deploy", comment="good"))
    run = Run(tmp_path)
    decide(run)
    assert run.document["approval"] == {"decision": "deploy", "comment": "good", "run": "digits-1"}
    decide(Run(tmp_path))  # killed after the answer: there is none left to give


def test_a_no_refuses_with_the_comment(tmp_path: Path, asked: list[Approval]) -> None:
    asked.append(Approval(decision="refuse", comment="not on a Friday"))
    with pytest.raises(GateRefused, match=r"version 3 of digits was refused by a person: not on a Friday"):
        decide(Run(tmp_path))


def test_another_run_of_what_was_refused_asks_again_and_a_schedule_does_not(
    tmp_path: Path, asked: list[Approval]
) -> None:
    asked.append(Approval(decision="refuse"))
    with pytest.raises(GateRefused):
        decide(Run(tmp_path))
    again = Run(tmp_path)
    again.document["cause"] = "form"
    with pytest.raises(GateRefused, match="the form or the command asks again"):  # the same run: it was answered
        decide(again)
    nightly, other = Run(tmp_path), Run(tmp_path)
    nightly.id, nightly.document["cause"] = "digits-2", "schedule"
    with pytest.raises(GateRefused):
        decide(nightly)
    asked.append(Approval(decision="deploy"))
    other.id, other.document["cause"] = "digits-3", "form"
    decide(other)
    assert other.document["approval"]["decision"] == "deploy" and asked == []


def test_an_old_yes_does_not_replace_what_is_newer(tmp_path: Path, asked: list[Approval]) -> None:
    asked.append(Approval(decision="deploy"))
    run = Run(tmp_path)
    run.store.write("endpoints/digits", {"serving": {"version": "12"}})
    with pytest.raises(GateRefused, match=r"newer version 12 is in service.*rollback --to 3"):
        decide(run)


def test_only_the_two_answers_count() -> None:
    with pytest.raises(ValueError, match="decision"):
        Approval(decision="perhaps")  # type: ignore[arg-type]


def test_an_answer_without_a_decision_is_none() -> None:
    with pytest.raises(ValueError, match="decision"):
        Approval()  # type: ignore[call-arg]


def test_a_pause_that_ended_without_an_answer_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect takes a name that was used for an answered pause, also where the run was cancelled in it: a retry would
    go on, nobody having said yes."""
    names: list[str] = []

    async def suspend(*, wait_for_input: Any, timeout: int, key: str) -> Approval:
        names.append(key)
        return wait_for_input(**({} if len(names) < 3 else {"decision": "refuse"}))  # type: ignore[no-any-return]

    async def told(run: object) -> None:
        """Nothing is shown."""

    monkeypatch.setattr(approval, "asuspend_flow_run", suspend)
    monkeypatch.setattr(approval, "told_so_far", told)
    monkeypatch.setattr(approval, "remember_waiting", lambda run: None)
    monkeypatch.setattr(approval, "get_run_logger", lambda: logging.getLogger("approval"))
    monkeypatch.setattr(approval, "runtime", SimpleNamespace(deployment=SimpleNamespace(id="d1")))
    run = Run(tmp_path)
    run.document |= {"pipeline": "digits", "model_version": "3", "git_sha": "5" * 40, "metrics": {}}
    model: Any = SimpleNamespace(version="3", model_url="http://m/3", decision={})
    given = asyncio.run(approval._ask(run, model, "k" * 40, 60))  # type: ignore[arg-type]
    assert given.decision == "refuse"
    assert names == [f"deploy-{'k' * 12}-{n}" for n in range(3)]


def test_the_question_says_what_a_person_needs(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.document |= {"metrics": {"accuracy": 0.99154, "loss": 0.04}, "git_sha": "56aa416" + "0" * 33}
    said = {"sentences": ["accuracy 0.991549 >= 0.95 (gate.minimum, the minimum)"]}
    model: Any = SimpleNamespace(version="6", model_url="http://mlflow/6", decision=said)
    asked = approval.question(run, model)  # type: ignore[arg-type]
    assert asked.splitlines()[0] == "**digits** version 6, commit 56aa416: accuracy 0.9915, loss 0.04."
    assert "- accuracy 0.991549 >= 0.95" in asked and "- in service now: nothing yet" in asked
    run.store.write("endpoints/digits", {"serving": {"version": "5"}})
    assert "- in service now: version 5" in approval.question(run, model)  # type: ignore[arg-type]


def test_the_question_says_what_this_run_has_otherwise_and_links_what_a_browser_reaches(tmp_path: Path) -> None:
    run = Run(tmp_path)
    ended = {"cause": "spot", "steps_lost": 3}, {"cause": "complete", "steps_lost": 0}
    run.document |= {"metrics": {}, "git_sha": "5" * 40, "overrides": ["train.seed=9"], "attempts": list(ended)}
    run.document["links"]["model"] = "https://mlflow.example/6"
    model: Any = SimpleNamespace(version="6", model_url="http://mlflow.reprise-services:5000/6", decision={})
    asked = approval.question(run, model)  # type: ignore[arg-type]
    assert "- changed for this run: train.seed=9" in asked
    assert "- trained in 2 attempts, 1 interruption, 3 steps lost" in asked
    assert asked.endswith("[The version in MLflow](https://mlflow.example/6)")
