"""What a place for checkpoints can do; one directory per checkpoint, whose manifest or rename is the commit.

Readers see only committed ones. Nothing is ever overwritten, and what is pruned first loses what makes it look
committed. Files of this machine: training/local_store.py. Object stores: training/object_store.py.
Not covered: what is in the files, and who decides to prune (training/checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

PREFIX = "step-"
QUARANTINE = "quarantine"
READ = 16 << 20


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; the ones before it stand. Names the path, bytes needed and bytes free."""


class Writer(Protocol):
    """A file being written. `finish` returns when its bytes are durable; `drop` gives up and leaves nothing."""

    def write(self, data: memoryview) -> None: ...
    def finish(self) -> None: ...
    def drop(self) -> None: ...


class Store(Protocol):
    """One training's checkpoints. `name` is a checkpoint's directory, `file` a file in it."""

    url: str

    def names(self) -> list[str]: ...
    def quarantined(self) -> list[str]: ...
    def create(self, name: str, file: str, nbytes: int) -> Writer: ...
    def settle(self, name: str) -> None: ...
    def commit(self, name: str, manifest: bytes) -> None: ...
    def abandon(self, name: str) -> None: ...
    def read(self, name: str, file: str) -> bytes: ...
    def size(self, name: str, file: str) -> int: ...
    def chunks(self, name: str, file: str, buffer: memoryview) -> Iterator[memoryview]: ...
    def stream(self, name: str, file: str, buffer: memoryview) -> Iterator[memoryview]: ...
    def quarantine(self, name: str, reason: str) -> str: ...
    def remove(self, name: str) -> None: ...
    def sweep(self, mine: str) -> None: ...


def open_store(url: str) -> Store:
    """The store behind a plain path, a file:// URL, or any other URL that fsspec knows (s3://bucket/prefix)."""
    if "://" in url and not url.startswith("file://"):
        from training.object_store import ObjectStore

        return ObjectStore(url)
    from training.local_store import LocalStore

    return LocalStore(Path(url.removeprefix("file://")))


def write_failure(path: str, nbytes: int, free: int | None, error: BaseException) -> CheckpointWriteError:
    """The error that tells a person what could not be written, and what stands."""
    room = "" if free is None else f", {free} bytes free there"
    return CheckpointWriteError(
        f"checkpoint not written: {path} ({nbytes} bytes needed{room}): {error}. "
        "The earlier checkpoints stand. Free space, keep fewer checkpoints, or give another store URL"
    )
