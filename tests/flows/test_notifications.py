"""Outcomes told: which one a run's end is, to whom, and that a failing block costs nothing but a warning."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from flows.notifications import message_of, notify, outcome_of
from tasks.train_model import _check_budgets
from tests.flows.test_settings import GOOD


def document(status: str, failed: str = "", message: str = "") -> dict[str, Any]:
    names = ("pull_data", "train_model", "register_model", "package_model", "deploy_model", "check_endpoint")
    return {
        "run": "digits-3", "pipeline": "digits", "git_sha": "a" * 40, "cause": "push", "status": status,
        "message": message, "metrics": {"accuracy": 0.987}, "model_version": "3",
        "links": {"prefect": "http://p/runs/1", "endpoint": "http://e"},
        "steps": [{"name": n, "status": "failed" if n == failed else "done"} for n in names],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ended", "outcome", "subject"),
    [
        (document("succeeded"), "success", "digits: version 3 is in service"),
        (document("unchanged"), "success", "digits: version 3 is in service"),
        (document("refused", message="accuracy 0.2 < 0.9"), "refusal", "digits: the new version may not serve"),
        (document("failed", "deploy_model"), "rollback", "digits: the rollout failed, the old version serves"),
        (document("failed", "train_model", "bug"), "failure", "digits: the run failed"),
        (document("failed", "check_endpoint"), "failure", "digits: the run failed"),
    ],
)
def test_outcomes(ended: dict[str, Any], outcome: str, subject: str) -> None:
    assert outcome_of(ended) == outcome
    assert message_of(ended)[0] == subject
    assert "http://p/runs/1" in message_of(ended)[1] and "accuracy 0.987" in message_of(ended)[1]


def test_a_spent_budget_as_the_training_words_it() -> None:
    """By the message that tasks.train_model really raises: if its words change, this fails."""
    from deployments.errors import GiveUp
    from tasks.records import Attempt

    attempts = [Attempt(number=n, started=1.0, ended=2.0, cause="spot") for n in range(3)]
    request = SimpleNamespace(spec=SimpleNamespace(key="k" * 40), interruptions=2, errors=2, since=0.0)
    with pytest.raises(GiveUp) as caught:
        _check_budgets(request, attempts)  # type: ignore[arg-type]
    assert outcome_of(document("failed", "train_model", str(caught.value))) == "budget"


class Block:
    """Stands for any block of Prefect's that notifies; a fake."""

    sent: ClassVar[list[tuple[str, str]]] = []
    error: ClassVar[Exception | None] = None

    @classmethod
    async def aload(cls, slug: str) -> Block:
        assert slug == "slack-webhook/team"
        return cls()

    async def notify(self, body: str, subject: str) -> None:
        if self.error:
            raise self.error
        self.sent.append((subject, body))


def tell(ended: dict[str, Any], settings: str, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> str:
    from flows.settings import load_pipeline

    Block.sent.clear()
    Block.error = error
    monkeypatch.setattr("prefect.blocks.core.Block", Block)
    plan = SimpleNamespace(pipeline=load_pipeline(f"{GOOD}[notify]\n{settings}\n"))
    return asyncio.run(notify(SimpleNamespace(plan=plan, document=ended)))  # type: ignore[arg-type]


def test_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tell(document("failed"), "", monkeypatch) == ""
    assert Block.sent == []


def test_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = 'block = "slack-webhook/team"\non = ["refusal"]'
    assert tell(document("succeeded"), settings, monkeypatch) == "" and Block.sent == []
    assert tell(document("refused"), settings, monkeypatch) == ""
    assert [subject for subject, _ in Block.sent] == ["digits: the new version may not serve"]


def test_a_block_that_fails_is_told_and_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said = tell(document("succeeded"), 'block = "slack-webhook/team"', monkeypatch, ConnectionError("no route"))
    assert said == "[notify] slack-webhook/team: ConnectionError: no route"
