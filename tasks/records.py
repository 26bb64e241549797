"""The store's records: what was done (step records), by which attempts (the ledger), in which runs; and the locks.

Prefect's history is not the ledger: killed runs stay Running there and their tasks are lost. These records are plain
JSON files, each written in one atomic rename, so a person can read them and a kill leaves the old one standing.
Standard library only. Not covered: checkpoints (training.checkpoint), stores other than file:// (see `Store`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError, TryAgain


def step_key(step: str, version: str, inputs: Mapping[str, Any]) -> str:
    """The identity of a step's work: 40 hex digits over its name, its version and the digests of its inputs."""
    text = json.dumps([step, version, dict(inputs)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A finished step. It exists only when the step's effects do."""

    key: str
    step: str
    inputs: dict[str, Any]  # what the key was made of, so that a plan can say which digest changed
    result: dict[str, Any]
    run: str  # the run that did the work
    started: float  # unix seconds
    ended: float
    seconds: float = 0.0  # the step's own time


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One launch of the trainer: a row of the ledger."""

    number: int  # from 1
    started: float  # unix seconds
    ended: float | None = None  # None: running, or lost with the flow that watched it
    cause: str = ""  # see deployments.workload.Cause
    reason: str = ""
    exit_code: int | None = None
    from_step: int = 0
    to_step: int = 0  # the last step that a checkpoint holds when the attempt ended
    reached_step: int = 0  # the last step it trained; reached_step - to_step are the steps lost
    notice_to_saved: float | None = None  # seconds
    idle_seconds: float = 0.0  # since the previous attempt ended
    node: str = ""
    capacity: str = ""  # spot | on-demand: asked for, and once it had a node that node's
    asked: str = ""  # why that capacity was asked for; empty where the place has one kind only


@dataclass(frozen=True, kw_only=True)
class Store:
    """The records under one root folder. Only file:// URLs and paths; an s3:// root is refused with the reason."""

    root: str
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        if "://" in self.root and not self.root.startswith("file://"):
            raise ConfigError(
                f"store = {self.root!r}: records need a file:// store (checkpoints may be on s3://); "
                "use a folder or a mounted volume"
            )
        object.__setattr__(self, "path", Path(self.root.removeprefix("file://")))

    def read(self, name: str) -> Any | None:
        """The JSON document `name` (a relative path without suffix), or None."""
        try:
            return json.loads((self.path / f"{name}.json").read_text())
        except FileNotFoundError:
            return None

    def write(self, name: str, document: Any) -> None:
        """Replace the document in one rename, durable before it is visible."""
        target = self.path / f"{name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{os.getpid()}.{time.monotonic_ns()}")
        with aside.open("w") as out:
            json.dump(document, out, indent=1, sort_keys=True)
            out.flush()
            os.fsync(out.fileno())
        aside.replace(target)

    def names(self, folder: str) -> list[str]:
        """Names of the documents in a folder, oldest first by name."""
        return sorted(p.stem for p in (self.path / folder).glob("*.json") if not p.name.startswith("."))

    def step(self, key: str) -> StepRecord | None:
        """The record of a finished step, or None."""
        raw = self.read(f"steps/{key}")
        return StepRecord(**raw) if raw else None

    def finish_step(self, record: StepRecord) -> None:
        """Say that a step is done. Its effects must exist by now."""
        self.write(f"steps/{record.key}", asdict(record))

    def attempts(self, key: str) -> list[Attempt]:
        """The ledger of one training, in order."""
        return [Attempt(**row) for row in self.read(f"trainings/{key}/attempts") or []]

    def write_attempts(self, key: str, attempts: list[Attempt]) -> None:
        """Replace the ledger of one training."""
        self.write(f"trainings/{key}/attempts", [asdict(a) for a in attempts])

    @contextmanager
    def lock(self, name: str, *, wait_seconds: float = 0.0) -> Iterator[None]:
        """Hold a lock that dies with its process. Raises TryAgain naming the holder if it is not free in time."""
        path = self.path / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as handle:
            give_up = time.monotonic() + wait_seconds
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= give_up:
                        handle.seek(0)
                        raise TryAgain(
                            f"lock {name!r} is held by {handle.read().strip() or 'another process'}"
                        ) from None
                    time.sleep(0.05)
            handle.truncate(0)
            handle.write(f"process {os.getpid()}")
            handle.flush()
            yield

    def held(self, name: str) -> bool:
        """Whether some living process holds the lock."""
        try:
            with self.lock(name):
                return False
        except TryAgain:
            return True
