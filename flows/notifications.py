"""Who hears of an outcome: a Prefect block (Slack, webhook, e-mail ...) named in [notify]; off while none is named.

    prefect block register -m prefect.blocks.notifications     # then make one in Prefect's UI: Blocks
    prefect block register -m prefect_email                     # for e-mail by SMTP

    [notify]
    block = "slack-webhook/team"                                # "webhook/ops", "email-server-credentials/mail", ...
    on = ["refusal", "rollback", "budget", "failure"]
    to = ["team@example.com"]                                   # of e-mail by SMTP alone

A block that is missing or fails costs a warning, never the run. Not covered: the blocks themselves, and a flow that was
killed without a word (flows.zombies marks it; Prefect's own automations can tell of that).
"""

from __future__ import annotations

import asyncio
from email.message import EmailMessage
from typing import Any

from flows.run import Run

MAIL = "email-server-credentials/"  # prefect-email's only block: a server, not a recipient
PATIENCE_SECONDS = 30.0


def outcome_of(document: dict[str, Any]) -> str:
    """success | refusal | rollback | budget | failure, of a finished run's document."""
    status = document["status"]
    if status in ("succeeded", "unchanged"):
        return "success"
    if status == "refused":
        return "refusal"
    failed = next((s["name"] for s in document["steps"] if s["status"] == "failed"), "")
    if failed == "train_model" and "budget [train]" in document["message"]:
        return "budget"
    # The rollout has put the old version back before it raised.
    return "rollback" if failed == "deploy_model" else "failure"


def message_of(document: dict[str, Any]) -> tuple[str, str]:
    """(subject, body) for a person."""
    what = {
        "success": f"version {document['model_version']} is in service",
        "refusal": "the new version may not serve",
        "rollback": "the rollout failed, the old version serves",
        "budget": "the training's budget is spent",
        "failure": "the run failed",
    }[outcome_of(document)]
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in sorted(document["metrics"].items()))
    lines = [
        f"run {document['run']}, commit {document['git_sha'][:12]}, cause {document['cause']}",
        *([numbers] if numbers else []),
        *([document["message"]] if document["message"] else []),
        *(f"{name}: {url}" for name, url in document["links"].items() if name in ("prefect", "report_mlflow", "model")),
    ]
    return f"{document['pipeline']}: {what}", "\n".join(lines)


async def notify(run: Run) -> str:
    """Tell the block of [notify], if this outcome is one of its `on`; returns what went wrong, empty if nothing did."""
    settings = run.plan.pipeline.notify
    if not settings.block or outcome_of(run.document) not in settings.on:
        return ""
    subject, body = message_of(run.document)
    try:
        # A block without a timeout of its own must not hold the run.
        await asyncio.wait_for(_tell(settings.block, settings.to, subject, body, run.document["run"]), PATIENCE_SECONDS)
    except TimeoutError:
        return f"[notify] {settings.block}: no answer after {PATIENCE_SECONDS:g} s"
    except Exception as error:  # whatever a block raises: the run itself is done
        return f"[notify] {settings.block}: {type(error).__name__}: {error}"
    return ""


async def _tell(slug: str, to: tuple[str, ...], subject: str, body: str, run: str) -> None:
    from prefect.blocks import notifications as notifications  # registers their types
    from prefect.blocks.core import Block
    from prefect.blocks.webhook import Webhook

    if slug.startswith(MAIL):
        import prefect_email as prefect_email
    block: Any = await Block.aload(slug)
    if isinstance(block, Webhook):
        answer = await block.call({"subject": subject, "text": body, "run": run})
        if answer.is_error:  # the block takes every answer for a good one; its own words would tell a secret URL
            raise ConnectionError(f"answered {answer.status_code}")
    elif slug.startswith(MAIL):
        await asyncio.to_thread(_send, block, to, subject, body)
    else:
        await block.notify(body=body, subject=subject)


def _send(block: Any, to: tuple[str, ...], subject: str, body: str) -> None:
    mail = EmailMessage()
    mail["Subject"], mail["To"] = subject, ", ".join(to)
    mail["From"] = block.username if "@" in (block.username or "") else to[0]
    mail.set_content(body)
    with block.get_server() as server:
        server.send_message(mail)
