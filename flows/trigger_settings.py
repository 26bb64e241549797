"""What starts a run and who hears of it: [schedule], [push], [deploy] and [notify] of pipeline.toml.

None of these keys enters a step key: changing them retrains nothing. Not covered: acting on them (flows.triggers,
flows.push_receiver, flows.push_status, flows.approval, flows.notifications).
"""

from __future__ import annotations

import re
import urllib.parse
import zoneinfo
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from flows.setting_types import Duration, SecretReference, Section, as_tuple

_REPOSITORY = re.compile(r"[A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+)+")
_BRANCH = re.compile(r"(?!-)(?!.*(?:\.\.|//|@\{|\.lock$|/$))[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}")
_PRIVATE = r"127\.[0-9.]+|10\.[0-9.]+|192\.168\.[0-9.]+|172\.(?:1[6-9]|2[0-9]|3[01])\.[0-9.]+"
_MAIL = re.compile(r"[^@\s,<>]+@[^@\s,<>]+")
_BLOCK = re.compile(r"[a-z0-9-]+/[a-z0-9-]+")
Outcome = Literal["success", "refusal", "rollback", "budget", "failure"]


def _cron(value: str) -> str:
    if not value:
        return value
    import datetime

    from cronsim import CronSim, CronSimError

    if len(value.split()) != 5:
        raise ValueError(
            'expected five fields "minute hour day month weekday", such as "0 3 * * *" (every day at 3:00)'
        )
    try:
        CronSim(value, datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
    except CronSimError as error:
        raise ValueError(
            'expected five fields "minute hour day month weekday", such as "0 3 * * 1-5" (at 3:00 on working days); '
            f"{error}"
        ) from None
    return value


def _zone(value: str) -> str:
    try:
        zoneinfo.ZoneInfo(value)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        from flows.settings_errors import did_you_mean

        known = sorted(zoneinfo.available_timezones())
        near = did_you_mean(value, known) or did_you_mean(value, [k.lower() for k in known])
        raise ValueError(f'expected a time zone of the IANA list, such as "Europe/Berlin" or "UTC"{near}') from None
    return value


def _one_branch(value: Any) -> Any:
    if isinstance(value, str) and not _BRANCH.fullmatch(value):
        raise ValueError(
            'expected the name of a branch, such as "main" or "release/2", without refs/heads/ or patterns'
        )
    return value


def _revision(value: Any) -> Any:
    if isinstance(value, str) and (value.startswith("-") or not value or not value.isprintable() or " " in value):
        raise ValueError('expected a branch, a tag or a commit, such as "HEAD", "main" or "origin/main"')
    return value


def _address(value: str) -> str:
    """http only within a machine, a cluster or a private net: a token goes there."""
    if not value:
        return value
    try:
        parts = urllib.parse.urlsplit(value)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError:
        host = ""
    near = "." not in host or host.endswith((".svc", ".local", ".internal")) or re.fullmatch(_PRIVATE, host)
    if not host or parts.scheme not in ("https", "http") or parts.query or parts.fragment or parts.username:
        raise ValueError('expected an address such as "https://gitea.example" without user, query or fragment')
    if parts.scheme == "http" and not near:
        raise ValueError("expected https://: a token would cross the net in the clear")
    return value.rstrip("/")


class ScheduleSettings(Section):
    """[schedule]: retrain by the clock. Registered by `reprise deploy`."""

    cron: Annotated[str, AfterValidator(_cron)] = ""  # empty: no schedule
    timezone: Annotated[str, AfterValidator(_zone)] = "UTC"
    paused: bool = False
    rev: Annotated[str, BeforeValidator(_revision)] = "HEAD"  # what is trained; "origin/main" is fetched first
    overlap: Literal["wait", "skip"] = "wait"  # one run of a pipeline at a time: the next waits, or is cancelled

    @field_validator("paused")
    @classmethod
    def _something_to_pause(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("cron") == "":
            raise ValueError('expected a cron to pause; add: cron = "0 3 * * *", or leave paused out')
        return value


class StatusSettings(Section):
    """[push.status]: the decision, said at the commit on the forge. Off while no forge is named."""

    forge: Literal["", "github", "gitlab", "gitea"] = ""  # gitea: Forgejo too
    # The API's root; empty: https://api.github.com or https://gitlab.com. GitHub Enterprise: https://HOST/api/v3.
    url: Annotated[str, AfterValidator(_address), Field(validate_default=True)] = ""
    token: SecretReference = "${REPRISE_FORGE_TOKEN}"  # or "file:/run/secrets/forge"
    context: str = Field(default="", max_length=100)  # what the status is called; empty: reprise/<pipeline>
    prefect: Annotated[str, AfterValidator(_address)] = ""  # its UI as people reach it; empty: as this machine does

    @field_validator("url")
    @classmethod
    def _home(cls, value: str, info: ValidationInfo) -> str:
        if not value and info.data.get("forge") == "gitea":
            raise ValueError('expected the address of the forge, such as "https://gitea.example"')
        return value


class PushSettings(Section):
    """[push]: retrain by git push. Read from the receiver's own checkout, never from what was pushed."""

    repository: str = ""  # "acme/digits", as the forge calls it; empty: pushes are refused
    branches: Annotated[
        tuple[Annotated[str, BeforeValidator(_one_branch)], ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = ("main",)
    # "${NAME}" or "file:/run/secrets/push"; at least 32 bytes, or the signing token of GitLab (whsec_...) as it is.
    secret: SecretReference = "${REPRISE_PUSH_SECRET}"
    remote: str = "origin"  # of the checkout, where pushed commits are fetched from
    settle: Duration = 3.0  # a push waits this long for a newer one
    status: StatusSettings = StatusSettings()

    @field_validator("repository")
    @classmethod
    def _forge_name(cls, value: str) -> str:
        if value and not _REPOSITORY.fullmatch(value):
            raise ValueError('expected the full name on the forge, such as "acme/digits", without https://')
        if value.lower().endswith(".git"):
            raise ValueError(f'expected the name as the forge calls it, without .git: "{value[:-4]}"')
        return value

    @field_validator("remote")
    @classmethod
    def _remote_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value):
            raise ValueError('expected the name of a git remote, such as "origin"')
        return value

    @field_validator("status")
    @classmethod
    def _of_a_repository(cls, value: StatusSettings, info: ValidationInfo) -> StatusSettings:
        if value.forge and info.data.get("repository") == "":
            raise ValueError('expected [push] repository beside it, such as "acme/digits": whose commits are these?')
        return value

    @field_validator("settle")
    @classmethod
    def _within_a_minute(cls, value: float) -> float:
        if value > 60:
            raise ValueError('expected at most "60s": a push that waits longer looks lost')
        return value


class DeploySettings(Section):
    """[deploy]: what has to happen before a model goes into service, besides the gate."""

    approval: bool = False  # a person answers in Prefect's UI
    approval_within: Duration = 604800.0  # seconds; then the run fails and can be resumed

    @field_validator("approval_within")
    @classmethod
    def _at_least_a_minute(cls, value: float) -> float:
        if value < 60:
            raise ValueError('expected at least "1m": a person has to read it')
        return value


class NotifySettings(Section):
    """[notify]: a Prefect block that hears of outcomes. Off while `block` is empty."""

    block: str = ""  # "slack-webhook/team", "webhook/ops", "sendgrid-email/..", "email-server-credentials/.." (SMTP)
    on: Annotated[tuple[Outcome, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (
        "success",
        "refusal",
        "rollback",
        "budget",
        "failure",
    )
    to: Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(validate_default=True)] = ()  # of e-mail by SMTP

    @field_validator("to")
    @classmethod
    def _addresses(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        mail = str(info.data.get("block", "")).startswith("email-server-credentials/")
        if mail and not value:
            raise ValueError('expected who gets the mail: to = ["team@example.com"]')
        if value and not mail:
            raise ValueError('expected block = "email-server-credentials/NAME" beside it: other blocks know who hears')
        if wrong := next((v for v in value if not _MAIL.fullmatch(v)), ""):
            raise ValueError(f'expected e-mail addresses such as "team@example.com"; {wrong!r} is none')
        return value

    @field_validator("block")
    @classmethod
    def _slug(cls, value: str) -> str:
        if value and not _BLOCK.fullmatch(value):
            raise ValueError('expected TYPE/NAME of a block in Prefect, such as "slack-webhook/team"')
        return value
