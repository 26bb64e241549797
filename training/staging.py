"""Copying the state out of the way of training: into one buffer that is allocated once and kept for life.

On a CPU a thread copies tensor by tensor while forward and backward run; `memmove` releases the interpreter lock. On
CUDA, when the device has room, the state is first cloned on the device (milliseconds) and goes out to pinned memory
behind the next steps; without room it goes to pinned memory at once, on a stream of its own.
Not covered: what is copied (training/state_tree.py, training/checkpoint.py) and what happens to the copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Protocol

import torch

from training.shard_file import CHUNK, Layout, Piece


class Arena:
    """`nbytes` of page-aligned memory, touched once so that later copies meet no page faults."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._pages = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
        with contextlib.suppress(AttributeError, OSError):  # a kernel without huge pages copies a little slower
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._pages)[:nbytes]
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        ctypes.memset(self.address, 0, nbytes)

    def tensor(self) -> torch.Tensor:
        """The memory as a uint8 tensor of shape (nbytes,), sharing it."""
        return torch.frombuffer(self._pages, dtype=torch.uint8, count=self.nbytes)


Sources = Sequence[tuple[Piece, torch.Tensor]]


class Snapshot(Protocol):
    """One copy of the state on its way. `wait` returns when the sources may change (or raises what went wrong),
    `chunks` gives the copy to the writer, `release` lets the next snapshot use the memory."""

    def wait(self) -> None: ...
    def chunks(self) -> Iterator[memoryview]: ...
    def release(self) -> None: ...


class Staging(Protocol):
    """One rank's staging area for one layout; `start` begins a copy of sources that hold still until its `wait`."""

    def start(self, sources: Sources) -> Snapshot: ...
    def close(self) -> None: ...


def _view(flat: torch.Tensor, piece: Piece) -> torch.Tensor:
    return flat[piece.start : piece.start + piece.nbytes].view(piece.dtype).view(piece.shape)


class HostStaging:
    """Staging for tensors in host memory, by a thread of its own."""

    def __init__(self, layout: Layout) -> None:
        self.arena = Arena(layout.nbytes)
        self.flat = self.arena.tensor() if layout.nbytes else torch.empty(0, dtype=torch.uint8)
        self.free = threading.Semaphore(1)
        self._queue: queue.SimpleQueue[HostSnapshot | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="checkpoint-staging", daemon=True)
        self._thread.start()

    def start(self, sources: Sources) -> HostSnapshot:
        """Begin to copy. While the last snapshot is still being written, the copy waits for it."""
        snapshot = HostSnapshot(self, sources)
        self._queue.put(snapshot)
        return snapshot

    def _run(self) -> None:
        while (snapshot := self._queue.get()) is not None:
            self.free.acquire()
            snapshot.copy()
            del snapshot

    def close(self) -> None:
        """Stop the thread; every snapshot must have been released."""
        self._queue.put(None)
        self._thread.join()


class HostSnapshot:
    """See Snapshot."""

    def __init__(self, staging: HostStaging, sources: Sources) -> None:
        self._staging, self._sources = staging, sources
        self._done: Future[None] = Future()

    def copy(self) -> None:
        """Copy every source to its place; memmove and copy_ release the interpreter lock."""
        base, move = self._staging.arena.address, ctypes.memmove
        try:
            for piece, tensor in self._sources:
                if tensor.is_contiguous():
                    move(base + piece.start, tensor.data_ptr(), piece.nbytes)
                elif piece.nbytes:
                    _view(self._staging.flat, piece).copy_(tensor)
        except BaseException as error:  # handed to whoever waits
            self._done.set_exception(error)
        else:
            self._done.set_result(None)
        self._sources = ()

    def wait(self) -> None:
        self._done.result()

    def chunks(self) -> Iterator[memoryview]:
        arena = self._staging.arena
        for at in range(0, arena.nbytes, CHUNK):
            yield arena.view[at : at + CHUNK]

    def release(self) -> None:
        wait([self._done])
        self._staging.free.release()
