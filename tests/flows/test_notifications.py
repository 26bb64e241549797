"""Outcomes told: which one a run's end is, to whom, and that a failing block costs nothing but a warning.

The blocks are Prefect's own, talking to real local servers for HTTP and SMTP; where they are kept is
tests/flows/triggers' to prove.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from aiosmtpd.controller import Controller
from prefect.blocks.notifications import SlackWebhook
from prefect.blocks.webhook import Webhook
from prefect_email import EmailServerCredentials

import flows.notifications
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


ENDS = {
    "success": (document("succeeded"), "digits: version 3 is in service"),
    "refusal": (document("refused", message="accuracy 0.2 < 0.9"), "digits: the new version may not serve"),
    "rollback": (document("failed", "deploy_model"), "digits: the rollout failed, the old version serves"),
    "budget": (
        document("failed", "train_model", "... budget [train] errors is spent"),
        "digits: the training's budget is spent",
    ),
}


class Hook:
    """An HTTP server that keeps what is posted to it."""

    def __init__(self) -> None:
        self.got: list[tuple[str, Any]] = []
        self.code = 200
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None: ...

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hook.got.append((self.path, body))
                self.send_response(hook.code)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def hook() -> Iterator[Hook]:
    made = Hook()
    yield made
    made.server.shutdown()
    made.server.server_close()


def through(block: Any, slug: str, ended: dict[str, Any], monkeypatch: pytest.MonkeyPatch, more: str = "") -> str:
    """What `notify` says when Prefect hands out this block."""
    from prefect.blocks.core import Block

    from flows.settings import load_pipeline

    async def load(name: str) -> Any:
        assert name == slug
        return block

    monkeypatch.setattr(Block, "aload", load)
    plan = SimpleNamespace(pipeline=load_pipeline(f'{GOOD}[notify]\nblock = "{slug}"\n{more}'))
    return asyncio.run(notify(SimpleNamespace(plan=plan, document=ended)))  # type: ignore[arg-type]


@pytest.mark.parametrize("outcome", ENDS)
def test_prefects_webhook_block(outcome: str, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, subject = ENDS[outcome]
    assert through(Webhook(url=f"{hook.url}/ops"), "webhook/ops", ended, monkeypatch) == ""
    ((path, body),) = hook.got
    assert (path, body["subject"], body["run"]) == ("/ops", subject, "digits-3")
    assert "prefect: http://p/runs/1" in body["text"]


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")  # Apprise loads all its plugins
@pytest.mark.parametrize("outcome", ENDS)
def test_prefects_slack_block(outcome: str, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slack's own address led here; the block takes only URLs of Slack's form."""
    monkeypatch.setattr("apprise.plugins.slack.NotifySlack.webhook_url", f"{hook.url}/services")
    ended, subject = ENDS[outcome]
    block = SlackWebhook(url="https://hooks.slack.com/services/T0123ABCD/B0123ABCD/abcdefghijklmnopqrstuvwx")
    assert through(block, "slack-webhook/team", ended, monkeypatch) == ""
    ((path, body),) = hook.got
    assert path == "/services/T0123ABCD/B0123ABCD/abcdefghijklmnopqrstuvwx"
    assert subject in json.dumps(body) and "digits-3" in json.dumps(body)


class Mailbox:
    """Of aiosmtpd: keeps what comes."""

    def __init__(self) -> None:
        self.mails: list[Any] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.mails.append(envelope)
        return "250 OK"


@pytest.mark.parametrize("outcome", ENDS)
def test_prefects_email_block(outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Mailbox()
    with socket.socket() as probe:  # its controller cannot say which port it was given
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    controller = Controller(mailbox, hostname="127.0.0.1", port=port)
    controller.start()
    try:
        block = EmailServerCredentials(smtp_server="127.0.0.1", smtp_type="INSECURE", smtp_port=port)
        ended, subject = ENDS[outcome]
        to = 'to = ["ada@example.com", "team@example.com"]\n'
        assert through(block, "email-server-credentials/ops", ended, monkeypatch, to) == ""
    finally:
        controller.stop()
    (mail,) = mailbox.mails
    assert mail.rcpt_tos == ["ada@example.com", "team@example.com"]
    assert f"Subject: {subject}" in mail.content.decode().replace("\r\n ", " ")
    assert "run digits-3" in mail.content.decode()


def test_what_a_webhook_refuses_is_told_without_its_url(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    hook.code = 403
    said = through(Webhook(url=f"{hook.url}/secret"), "webhook/ops", document("succeeded"), monkeypatch)
    assert said == "[notify] webhook/ops: ConnectionError: answered 403"


def test_a_mail_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    block = EmailServerCredentials(smtp_server="127.0.0.1", smtp_type="INSECURE", smtp_port=1)
    said = through(block, "email-server-credentials/ops", document("failed"), monkeypatch, 'to = ["a@b.c"]\n')
    assert said.startswith("[notify] email-server-credentials/ops: ConnectionRefusedError")


def test_a_block_that_hangs_does_not_hold_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging:
        async def notify(self, body: str, subject: str) -> None:
            await asyncio.sleep(60)

    monkeypatch.setattr(flows.notifications, "PATIENCE_SECONDS", 0.1)
    said = through(Hanging(), "slack-webhook/team", document("succeeded"), monkeypatch)
    assert said == "[notify] slack-webhook/team: no answer after 0.1 s"
