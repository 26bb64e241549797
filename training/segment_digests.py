"""sha256 of a file segment by segment: several are hashed at once, and a difference is told by where it is.

One core hashes about 1.8 GB/s, a disk or a network takes and gives more: one digest over the whole file would decide
how long a checkpoint takes until it is durable, and how long a restart waits for its bytes. To check one by hand:
`tail -c +4097 FILE | head -c 33554432 | sha256sum` is the first segment after a header of 4096 bytes.
Standard library only. Not covered: what is in the file (training/shard_file.py), where digests are kept
(training/manifest.py).
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

SEGMENT = 32 << 20  # bytes: a task of some milliseconds, and a few hundred lines in the manifest of a 12 GB file
THREADS = 4  # at most, and a quarter of the processors: the others have a training, or other ranks


class SegmentDigests:
    """`with SegmentDigests(first=header_bytes) as digests:`, then `add` the whole file in order, then `finish`."""

    def __init__(self, *, first: int, threads: int = THREADS) -> None:
        """`first`: bytes of the first segment; all others have SEGMENT, the last one what is left."""
        threads = max(1, min(threads, max(2, len(os.sched_getaffinity(0)) // 4)))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="checkpoint-hash")  # threads start when needed
        self._made: list[str | Future[str]] = []
        self._open(first)

    def __enter__(self) -> SegmentDigests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)  # nobody reads the memory any more
        self._pending.clear()

    def add(self, data: memoryview, *, aside: bool) -> None:
        """The next bytes. `aside`: by other threads, of the caller's priority, while the caller goes on; `data` must
        hold still until `finish` then. Else they are hashed when this returns."""
        while data:
            part, data = data[: self._room], data[self._room :]
            self._pending.append(part)
            self._room -= len(part)
            if not aside:
                self._hash(self._digest, self._pending)
            if not self._room:
                self._close(aside=aside)
                self._open(SEGMENT)

    def finish(self) -> tuple[str, ...]:
        """The digests of all segments, in the file's order."""
        if self._begun():
            self._close(aside=False)
            self._open(0)
        return tuple(made if isinstance(made, str) else made.result() for made in self._made)

    def _open(self, room: int) -> None:
        self._size = self._room = room
        self._digest: Any = hashlib.sha256()
        self._pending: list[memoryview] = []

    def _begun(self) -> bool:
        return self._room < self._size

    def _close(self, *, aside: bool) -> None:
        if aside:
            self._made.append(self._pool.submit(self._hash, self._digest, self._pending))
        else:
            self._made.append(self._hash(self._digest, self._pending))

    @staticmethod
    def _hash(digest: Any, pending: list[memoryview]) -> str:
        for part in pending:
            digest.update(part)
        pending.clear()
        return str(digest.hexdigest())


def difference(found: tuple[str, ...], expected: tuple[str, ...], *, first: int, nbytes: int) -> str:
    """Where a file differs from what was written, in words; empty if it does not."""
    if found == expected:
        return ""
    at = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return f"{len(found)} segments, {len(expected)} were written"
    start = 0 if at == 0 else first + (at - 1) * SEGMENT
    end = first if at == 0 else min(start + SEGMENT, nbytes)
    others = sum(a != b for a, b in zip(found, expected, strict=False)) - 1
    more = f", nor that of {others} more" if others else ""
    return f"the sha256 of bytes {start} to {end} is not that of the bytes written{more}"
