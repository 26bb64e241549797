"""Copying the state out of the way of training: into one buffer that is allocated once and kept for life.

A thread copies block by block while forward and backward run; `memmove` releases the interpreter lock, and whoever
comes to wait helps to finish. The buffer has the layout of the file, so the copy is also the serialisation. Where
processors are to spare, the writer follows the copy block by block; with few it would slow the copy that it waits for.
CUDA states go through training/device_staging.py.
Not covered: what is copied (training/state_tree.py) and what happens to the copy (training/checkpoint.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Protocol

import torch

from training.shard_file import CHUNK, Layout, Piece, has_processors_to_spare

BLOCK = 4 << 20  # bytes per memmove: two threads share one tensor, and a block is done in about a millisecond
Sources = Sequence[tuple[Piece, torch.Tensor]]
Block = Callable[[], object]  # copies one


class OtherShape(Exception):
    """A tensor is not of the shape, type or device that the layout was made for."""


def be_modest() -> None:
    """The calling thread does not push the training's threads off a processor when it wakes up."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class Arena:
    """`nbytes` of page-aligned memory, touched once so that later copies meet no page faults, unless it is not used
    again."""

    def __init__(self, nbytes: int, *, touched: bool = True) -> None:
        self.nbytes = nbytes
        self._pages = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
        with contextlib.suppress(AttributeError, OSError):  # a kernel without huge pages copies a little slower
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._pages)[:nbytes]
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        if touched:
            ctypes.memset(self.address, 0, nbytes)

    def tensor(self) -> torch.Tensor:
        """The memory as a uint8 tensor of shape (nbytes,), sharing it."""
        if not self.nbytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._pages, dtype=torch.uint8, count=self.nbytes)

    def chunks(self) -> Iterator[memoryview]:
        """The memory in pieces of at most CHUNK bytes."""
        for at in range(0, self.nbytes, CHUNK):
            yield self.view[at : at + CHUNK]


class Snapshot(Protocol):
    """One copy of the state on its way."""

    def wait(self) -> None:
        """For the training thread: returns when the state may change, or raises what went wrong (OtherShape: nothing
        was copied)."""

    def chunks(self) -> Iterator[memoryview]:
        """For the writer: the copy in the file's order, each part once it is there."""

    def device_seconds(self) -> float:
        """Seconds that the device's stream stood still for this copy; known after `chunks` has ended."""

    def release(self) -> None:
        """Let the next snapshot use the memory. Called exactly once, also after a failure."""


class Staging(Protocol):
    """One rank's staging area for one layout. `start` begins a copy of sources that hold still until its `wait`;
    `when_staged` is called once, from any thread, when `chunks` may be asked for without a long wait."""

    def start(self, sources: Sources, when_staged: Callable[[], object]) -> Snapshot: ...
    def close(self) -> None: ...


def view_in(flat: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The piece's place in a flat uint8 tensor that has the rank's layout."""
    return flat[piece.start : piece.start + piece.nbytes].view(piece.dtype).view(piece.shape)


class HostStaging:
    """Staging for tensors in host memory, by a thread of its own."""

    def __init__(self, layout: Layout) -> None:
        self.arena = Arena(layout.nbytes)
        self.flat = self.arena.tensor()
        self.free = threading.Semaphore(1)
        self._queue: queue.SimpleQueue[HostSnapshot | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="checkpoint-staging", daemon=True)
        self._thread.start()

    def start(self, sources: Sources, when_staged: Callable[[], object]) -> HostSnapshot:
        """Begin to copy. While the last snapshot is still being written, the copy waits for it."""
        snapshot = HostSnapshot(self, sources, when_staged)
        self._queue.put(snapshot)
        return snapshot

    def _run(self) -> None:
        be_modest()
        while (snapshot := self._queue.get()) is not None:
            self.free.acquire()
            snapshot.begin()
            snapshot.copy()
            del snapshot

    def close(self) -> None:
        """Stop the thread; every snapshot must have been released."""
        self._queue.put(None)
        self._thread.join()


class HostSnapshot:
    """See Snapshot. The staging thread and the waiting one take blocks from one iterator (`next` on it is atomic)."""

    def __init__(self, staging: HostStaging, sources: Sources, when_staged: Callable[[], object]) -> None:
        self._staging, self._sources, self._when_staged = staging, sources, when_staged
        self._lock = threading.Lock()
        self._done: Future[None] = Future()
        self._error: BaseException | None = None
        self._begun = threading.Event()
        self._blocks: Iterator[tuple[int, Block]] = iter(())
        self._left = 0
        self._followed = has_processors_to_spare()  # the writer reads what is there while the rest is being copied
        self._ends: list[int] = []  # of the blocks, in bytes of the arena; they grow
        self._copied = bytearray()  # 1 for each block that is there
        self._progress = threading.Condition()

    def begin(self) -> None:
        """The memory is free: copying may start, by this thread and whoever waits."""
        blocks: Sequence[tuple[int, Block]] = ()
        try:
            blocks = _blocks(self._staging, self._sources)
        except Exception as error:  # handed to whoever waits
            self._error = error
        self._followed = self._followed and bool(blocks)
        self._ends, self._copied = [end for end, _ in blocks], bytearray(len(blocks))
        self._left, self._blocks = len(blocks), enumerate([block for _, block in blocks])
        self._begun.set()
        if self._followed:
            self._when_staged()
        elif not blocks:
            self._finish()

    def copy(self) -> None:
        """Copy blocks until none is left to begin; the last thread to finish one reports."""
        count = 0
        for index, block in self._blocks:
            try:
                block()
            except BaseException as error:  # handed to whoever waits, when nobody copies any more
                self._error = error
            count += 1
            if self._followed:
                with self._progress:
                    self._copied[index] = 1
                    self._progress.notify_all()
        with self._lock:
            self._left -= count
            finished = count > 0 and self._left == 0
        if finished:
            self._finish()

    def _finish(self) -> None:
        self._sources = ()
        if self._error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(self._error)
        if not self._followed:
            self._when_staged()

    def wait(self) -> None:
        if not self._done.done():
            self._begun.wait()
            self.copy()
        self._done.result()

    def chunks(self) -> Iterator[memoryview]:
        if not self._followed:
            self._done.result()
        block = at = 0
        for chunk in self._staging.arena.chunks():
            at += len(chunk)
            while self._followed and block < len(self._ends) and (not block or self._ends[block - 1] < at):
                with self._progress:
                    self._progress.wait_for(partial(self._copied.__getitem__, block))
                block += 1
            if at == self._staging.arena.nbytes:
                self._done.result()  # a copy that went wrong has no last chunk
            yield chunk

    def device_seconds(self) -> float:
        return 0.0

    def release(self) -> None:
        wait([self._done])
        self._staging.free.release()


def _blocks(staging: HostStaging, sources: Sources) -> Sequence[tuple[int, Block]]:
    """The copy as many independent calls in the arena's order, each with the byte where it ends. Raises OtherShape."""
    base, move = staging.arena.address, ctypes.memmove
    blocks: list[tuple[int, Block]] = []
    for piece, tensor in sources:
        if tensor.shape != piece.shape or tensor.dtype != piece.dtype or not tensor.is_cpu:
            raise OtherShape(
                f"{piece.key}: {list(tensor.shape)} {tensor.dtype}; {list(piece.shape)} {piece.dtype} is planned"
            )
        if not tensor.is_contiguous():
            blocks.append((piece.start + piece.nbytes, partial(_copy_strided, staging.flat, piece, tensor)))
            continue
        source = tensor.data_ptr()
        for at in range(0, piece.nbytes, BLOCK):
            size = min(BLOCK, piece.nbytes - at)
            blocks.append((piece.start + at + size, partial(move, base + piece.start + at, source + at, size)))
    return blocks


def _copy_strided(flat: torch.Tensor, piece: Piece, tensor: torch.Tensor) -> None:
    with torch.no_grad():
        view_in(flat, piece).copy_(tensor)
