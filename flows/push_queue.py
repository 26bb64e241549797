"""The pushes that came in, each kept on disk before it is answered, and what became of it.

One SQLite file per pipeline (P/.reprise/push/<pipeline>.db). A push is its repository, branch and the two commits it
went between, so a redelivery finds itself already there. Its row waits until it is decided; a process that dies in
between leaves it waiting. Standard library only. Not covered: deciding (flows.push_plan), handing over
(flows.push_handover).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from deployments.errors import TryAgain

State = Literal["waiting", "started", "nothing", "superseded", "refused"]
ZERO = "0" * 40
BUSY_SECONDS = 30.0  # a push that is kept late is worth more than one that is refused

_TABLE = """
CREATE TABLE IF NOT EXISTS pushes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    push TEXT NOT NULL,
    branch TEXT NOT NULL,
    after TEXT NOT NULL,
    received REAL NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting',
    action TEXT NOT NULL DEFAULT '',
    reason TEXT NOT NULL DEFAULT '',
    flow_run TEXT NOT NULL DEFAULT '',
    tries INTEGER NOT NULL DEFAULT 0,
    next_try REAL NOT NULL DEFAULT 0,
    decided REAL
);
CREATE INDEX IF NOT EXISTS waiting ON pushes (state, branch, number);
"""


@dataclass(frozen=True, kw_only=True)
class Push:
    """One push to one branch."""

    repository: str  # "acme/digits"
    branch: str  # without refs/heads/
    before: str  # 40 hex digits; zeros for a new branch
    after: str
    body: str = ""  # digest of the delivery; the same push made again later has another
    pusher: str = ""
    source: str = "hook"  # github | gitlab | gitea | hook

    @property
    def cause(self) -> str:
        """40 hex digits, the same for every copy of this push."""
        text = json.dumps([self.repository, self.branch, self.before, self.after])
        return hashlib.sha256(text.encode()).hexdigest()[:40]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A push in the queue."""

    id: str  # its cause; with a suffix where a branch made the same move again
    number: int  # in the order of arrival
    push: Push
    received: float  # unix seconds
    state: State
    action: str  # nothing | redeploy | retrain, once decided
    reason: str
    flow_run: str  # Prefect's id, once handed over
    tries: int
    next_try: float  # unix seconds


class Unusable(TryAgain):
    """The queue's file cannot be used now: nothing was kept, nothing was decided."""


class PushQueue:
    """The queue of one pipeline. Safe for several threads and processes; a connection per call.

    Every method raises Unusable where the disk is full, somebody holds the file for long, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.executescript(_TABLE)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)) as db:
                db.execute("PRAGMA synchronous=FULL")  # an answered push survives the machine, not only the process
                db.row_factory = sqlite3.Row
                yield db
        except sqlite3.Error as error:
            raise Unusable(
                f"{self.path}: the queue of pushes cannot be used: {error}; expected a sound file and free disk; "
                "if it is damaged, move it away: a new one is made, and the next push is compared with its own base"
            ) from error

    def add(self, push: Push) -> tuple[str, bool]:
        """Keep it: (its id, whether it is new). On the disk when this returns.

        A known move of a branch is a copy, unless the branch went elsewhere since and this is another delivery.
        """
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            push_id = push.cause
            for row in db.execute(
                "SELECT id, push, number FROM pushes WHERE id LIKE ?", (f"{push.cause}%",)
            ).fetchall():
                if json.loads(row["push"])["body"] == push.body or not _went_on(db, push, row["number"]):
                    db.execute("ROLLBACK")
                    return str(row["id"]), False
                push_id = f"{push.cause}-{hashlib.sha256(push.body.encode()).hexdigest()[:8]}"
            db.execute(
                "INSERT INTO pushes (id, push, branch, after, received) VALUES (?, ?, ?, ?, ?)",
                (push_id, json.dumps(asdict(push)), push.branch, push.after, time.time()),
            )
            db.execute("COMMIT")
            return push_id, True

    def waiting(self) -> list[Entry]:
        """What is not decided yet, oldest first."""
        return self._entries("WHERE state = 'waiting' ORDER BY number")

    def entries(self, limit: int = 100) -> list[Entry]:
        """The last ones, newest first."""
        return self._entries("ORDER BY number DESC LIMIT ?", limit)

    def find(self, push_id: str) -> Entry | None:
        """One push by its id."""
        return next(iter(self._entries("WHERE id = ?", push_id)), None)

    def last_decided(self, branch: str) -> Entry | None:
        """The newest push of a branch that was started or needed nothing: what the next one is compared with."""
        found = self._entries(
            "WHERE branch = ? AND state IN ('started', 'nothing') ORDER BY number DESC LIMIT 1", branch
        )
        return found[0] if found else None

    def started(self, after: str) -> bool:
        """Whether a run was started for this commit."""
        return bool(self._entries("WHERE after = ? AND state = 'started' LIMIT 1", after))

    def decide(self, entry: Entry, state: State, *, action: str = "", reason: str = "", flow_run: str = "") -> None:
        """Write down what became of it, once: a decision that stands is left alone."""
        with self._open() as db:
            db.execute(
                "UPDATE pushes SET state = ?, action = ?, reason = ?, flow_run = ?, decided = ? "
                "WHERE number = ? AND state = 'waiting'",
                (state, action, reason, flow_run, time.time(), entry.number),
            )

    def postpone(self, entry: Entry, seconds: float, reason: str) -> None:
        """Try it again later."""
        with self._open() as db:
            db.execute(
                "UPDATE pushes SET tries = tries + 1, next_try = ?, reason = ? WHERE number = ? AND state = 'waiting'",
                (time.time() + seconds, reason, entry.number),
            )

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Whether it is ours to decide now: one process at a time, freed by its death."""
        with self.path.with_suffix(".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _entries(self, where: str, *values: object) -> list[Entry]:
        with self._open() as db:
            return [_entry(row) for row in db.execute(f"SELECT * FROM pushes {where}", values)]


def _went_on(db: sqlite3.Connection, push: Push, number: int) -> bool:
    """Whether the branch was pushed elsewhere after that row."""
    later = "SELECT 1 FROM pushes WHERE branch = ? AND number > ? AND after != ? LIMIT 1"
    return db.execute(later, (push.branch, number, push.after)).fetchone() is not None


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(
        id=row["id"],
        number=row["number"],
        push=Push(**json.loads(row["push"])),
        received=row["received"],
        state=row["state"],
        action=row["action"],
        reason=row["reason"],
        flow_run=row["flow_run"],
        tries=row["tries"],
        next_try=row["next_try"],
    )
