"""The decision about a push, said at its commit on the forge: pending, then how the run ended.

    [push.status]
    forge = "github"                       # or "gitlab", "gitea" (Forgejo too); off while none is named
    token = "${REPRISE_FORGE_TOKEN}"       # or "file:/run/secrets/forge"

Best effort, beside the work: a loop of its own reads what was decided and what became of the runs. Nothing waits for
it, and a forge that is away is told later. What was said is kept beside the queue, so a restart repeats nothing. Not
covered: deciding (flows.push_handover), the forges' dialects (flows.push_forges).
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deployments.errors import GiveUp, StepError
from flows.push_forges import HOMES, LONGEST_WAIT, Away, Barred, Repository, Status
from flows.push_handover import Target, one_line
from flows.push_queue import Entry
from flows.references import secret

POLL_SECONDS = 2.0
PATIENCE = 3 * 86_400.0  # seconds after a push that its status is still looked after
UNDECIDED_SECONDS = 10.0  # so long a push may take to be decided before "waiting" is said
CRASHED_SECONDS = 60.0  # a crash that nobody resumed by then (flows.zombies) is a failure
BARRED_SECONDS = 600.0  # between tries with a token that was refused
LONGEST_BACKOFF = 300.0
DOING = {"retrain": ("Retraining", "Retrained"), "redeploy": ("Redeploying", "Redeployed")}

_TABLE = """
CREATE TABLE IF NOT EXISTS statuses (
    number INTEGER PRIMARY KEY,
    said TEXT NOT NULL DEFAULT '',
    closed INTEGER NOT NULL DEFAULT 0,
    tries INTEGER NOT NULL DEFAULT 0,
    next_try REAL NOT NULL DEFAULT 0
);
"""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was said of a push so far."""

    said: str = ""  # the status as JSON
    closed: bool = False
    tries: int = 0
    next_try: float = 0.0  # unix seconds


class StatusLog:
    """Beside the queue of a pipeline: what was said of each of its pushes, by the push's number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._open()) as db:
            db.executescript(_TABLE)

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=30, isolation_level=None)

    def read(self, number: int) -> Record:
        """Of one push; an empty record if nothing was said."""
        wanted = "SELECT said, closed, tries, next_try FROM statuses WHERE number = ?"
        with closing(self._open()) as db:
            row = db.execute(wanted, (number,)).fetchone()
        return Record(said=row[0], closed=bool(row[1]), tries=row[2], next_try=row[3]) if row else Record()

    def write(self, number: int, record: Record) -> None:
        """Replace it."""
        values = (number, record.said, record.closed, record.tries, record.next_try)
        with closing(self._open()) as db:
            db.execute("INSERT OR REPLACE INTO statuses VALUES (?, ?, ?, ?, ?)", values)


def status_file(target: Target) -> Path:
    """Where the log of a pipeline is."""
    return target.queue.path.with_suffix(".status.db")


def status_of(entry: Entry, run: dict[str, Any] | None, url: str, *, now: float) -> tuple[Status | None, bool]:
    """(what to say of a push, None while it is too early; whether that is the end of it). Pure.

    `run` is the flow run as Prefect has it, {} while Prefect is away, None if it was deleted; `url` its page.
    """
    if entry.state == "waiting":
        slow = now - entry.received > UNDECIDED_SECONDS
        return (Status(word="waiting", description="Waits to be decided") if slow else None), False
    if entry.state == "nothing":
        return Status(word="success", description=f"Nothing to do: {entry.reason}"), True
    if entry.state == "superseded":
        return Status(word="success", description=f"Skipped: {entry.reason}"), True
    if entry.state == "refused":
        return Status(word="failure", description=f"Refused: {entry.reason}"), True
    doing, done = DOING.get(entry.action, ("Running", "Done"))
    if run is None:
        return Status(word="cancelled", description=f"{doing} was cancelled: the run was deleted"), True
    state = run.get("state") or {}
    kind, name = state.get("type", ""), state.get("name", "")
    if kind == "COMPLETED":
        return Status(word="success", description=f"{done}: {entry.reason}", target_url=url), True
    if kind == "CANCELLED" and name == "Superseded":
        return Status(word="success", description=f"Skipped: {state.get('message', '')}", target_url=url), True
    # These three can go on: a retry, or a crash that is resumed, is looked after until PATIENCE is over.
    if kind == "CANCELLED":
        return Status(word="cancelled", description=f"{doing} was cancelled: {entry.reason}", target_url=url), False
    if kind == "FAILED" or (kind == "CRASHED" and _age(state, now) > CRASHED_SECONDS):
        return Status(word="failure", description=f"{doing} failed: {entry.reason}", target_url=url), False
    waits = ", waits for approval" if kind == "PAUSED" else ""
    return Status(word="running", description=f"{doing}{waits}: {entry.reason}", target_url=url), False


def _age(state: dict[str, Any], now: float) -> float:
    import datetime

    return now - datetime.datetime.fromisoformat(state["timestamp"]).timestamp()


def repository_of(target: Target) -> Repository:
    """Where statuses go. Raises ConfigError for a token that is not there."""
    push = target.settings.push
    status = push.status
    assert status.forge
    token = secret(status.token, what=f"{target.settings.file}: [push.status] token")
    return Repository(
        forge=status.forge,
        url=status.url or HOMES[status.forge],
        name=push.repository,
        token=token.decode("latin-1"),
        context=status.context or f"reprise/{target.name}",
    )


def report(target: Target, log: StatusLog, repository: Repository) -> list[str]:
    """Say once what has changed; returns what a person should know. Raises nothing that the forge or Prefect did."""
    told, now = [], time.time()
    for entry in reversed(target.queue.entries(200)):
        record = log.read(entry.number)
        # A wait that is longer than any is one from before the clock was put back.
        if record.closed or 0 < record.next_try - now <= LONGEST_WAIT or now - entry.received > PATIENCE:
            continue
        try:
            status, last = status_of(entry, *_run(target, entry), now=now)
            said = json.dumps(asdict(status)) if status else record.said
            if status and said != record.said:
                repository.post(entry.push.after, _public(target, status))
            if said != record.said or last or record.tries:
                log.write(entry.number, Record(said=said, closed=last))
        except Away as error:
            wait = max(error.seconds, min(2.0 ** min(record.tries, 10), LONGEST_BACKOFF))
            log.write(entry.number, Record(said=record.said, tries=record.tries + 1, next_try=now + wait))
            told.append(f"[push.status] {error}; tried again, the run goes on")
            break  # the others would wait for the same timeout
        except Barred as error:
            log.write(entry.number, Record(said=record.said, tries=record.tries + 1, next_try=now + BARRED_SECONDS))
            told.append(f"[push.status] {error}")
        except GiveUp as error:
            log.write(entry.number, Record(said=record.said, closed=True))
            told.append(f"[push.status] {entry.push.after[:7]}: {error}; not said")
    return told


def _run(target: Target, entry: Entry) -> tuple[dict[str, Any] | None, str]:
    """(the flow run as `status_of` takes it, its page for people)"""
    if not entry.flow_run:
        return {}, ""
    page = f"{target.settings.push.status.prefect or target.prefect.url}/runs/flow-run/{entry.flow_run}"
    try:
        return target.prefect.run(entry.flow_run), page
    except StepError:
        return {}, page


def _public(target: Target, status: Status) -> Status:
    """A status may be read by the world: without the folders of this machine."""
    plain = status.description.replace(f"{target.project.root}/", "").replace(str(target.project.root), "the checkout")
    return Status(word=status.word, description=plain, target_url=status.target_url)


def report_forever(target: Target, stopped: Callable[[float], bool], tell: Callable[[str], None]) -> None:
    """Report until `stopped(seconds)` says so; at once over where no forge is named. Each trouble is told once."""
    if not target.settings.push.status.forge:
        return
    log, told = StatusLog(status_file(target)), set[str]()
    while not stopped(POLL_SECONDS):
        try:
            repository = repository_of(target)
            with log.path.with_suffix(".lock").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # one process at a time, freed by its death
                lines = report(target, log, repository)
        except BlockingIOError:
            continue
        except (StepError, OSError, sqlite3.Error) as error:
            lines = [str(error)]
        for line in dict.fromkeys(lines):
            if line not in told:
                tell(one_line(f"{target.name}: {line}"))
        told.update(lines)
