"""Staging for tensors on a CUDA device: out to pinned memory behind the training's steps.

When the device has room, the state is first cloned on the device, which takes milliseconds, and goes out from the
clone; without room it goes out at once, and the optimizer's step waits for that, on the device and not on the host.
Chosen at the first save, when the training's own peak is known. The clone is kept for life, like the pinned memory.
Not covered: several devices in one process.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable, Iterator

import torch

from training.shard_file import CHUNK, Layout
from training.staging import Arena, Sources, view_in

MARGIN = 0.05  # share of the device's memory that must stay free beside a clone
GROUP = 256 << 20  # bytes copied out per event: the writer begins after the first group
LARGE = 1 << 20  # bytes from which a tensor is copied by itself: one launch for many leaves most of the device idle


class PinnedArena(Arena):
    """An arena that the device may write to without a detour. Registered, not allocated by CUDA, whose caching
    allocator would round its size up to a power of two."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        if nbytes:
            error = torch.cuda.cudart().cudaHostRegister(self.address, nbytes, 0)  # type: ignore[no-untyped-call]
            self.pinned = int(error) == 0
            if not self.pinned:  # a low memlock limit, mostly: slower, and still right
                warnings.warn(
                    f"{nbytes} bytes cannot be pinned (CUDA error {int(error)})", RuntimeWarning, stacklevel=2
                )

    def close(self) -> None:
        """Unpin; the memory goes with the last view of it."""
        if self.nbytes and self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.address)  # type: ignore[no-untyped-call]
            self.pinned = False


class DeviceStaging:
    """See the module. Host tensors among the sources (step counters) are copied at once: they must be small."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.arena = PinnedArena(layout.nbytes)
        self.flat = self.arena.tensor()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.clone: torch.Tensor | None = None
        self.decided = False
        self.targets: dict[int, torch.Tensor] = {}  # of the clone, or without one of the arena, by where a piece starts
        self.clone_free = threading.Semaphore(1)
        self.arena_free = threading.Semaphore(1)

    def start(self, sources: Sources, when_staged: Callable[[], object]) -> DeviceSnapshot:
        """Queue the copy behind the work that the current stream has; waits on the host only while the memory is
        still in use by the last snapshot."""
        if not self.decided:
            self.clone, self.decided = self._room(), True
            flat = self.flat if self.clone is None else self.clone
            on_device = [p for p in self.layout.pieces if p.nbytes and p.start < self.layout.device_bytes]
            self.targets = {p.start: view_in(flat, p) for p in on_device}  # made once: a thousand cost milliseconds
        (self.arena_free if self.clone is None else self.clone_free).acquire()
        snapshot = DeviceSnapshot(self, sources)
        when_staged()  # the writer itself waits for the device, part by part
        return snapshot

    def _room(self) -> torch.Tensor | None:
        free, total = torch.cuda.mem_get_info(self.device)
        if free - self.layout.device_bytes < MARGIN * total:
            return None
        try:
            return torch.empty(self.layout.device_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            return None

    def close(self) -> None:
        """Free the memory; every snapshot must have been released."""
        torch.cuda.synchronize(self.device)
        self.clone, self.targets = None, {}
        self.arena.close()


class DeviceSnapshot:
    """See training.staging.Snapshot."""

    def __init__(self, staging: DeviceStaging, sources: Sources) -> None:
        self._staging = staging
        on_device = [(p, t) for p, t in sources if t.device.type != "cpu" and p.nbytes]
        self._host = [(p, t.detach().clone()) for p, t in sources if t.device.type == "cpu" and p.nbytes]
        self._copied, self._stop, self._go = _event(), _event(), _event()
        self._waited = False
        self._events: list[tuple[int, torch.cuda.Event]] = []  # (bytes that are out, when)
        self._holds_clone = staging.clone is not None
        self._holds_arena = not self._holds_clone
        self._sources = on_device  # kept alive until the copy is made
        staging.stream.wait_stream(torch.cuda.current_stream(staging.device))
        with torch.cuda.stream(staging.stream), torch.no_grad():
            if staging.clone is not None:
                copy_on_device(staging.targets, on_device)
            else:
                for piece, tensor in on_device:
                    staging.targets[piece.start].copy_(tensor, non_blocking=True)
                    self._mark(piece.start + piece.nbytes)
            self._copied.record()

    def _mark(self, end: int) -> None:
        if not self._events or end - self._events[-1][0] >= GROUP or end == self._staging.layout.device_bytes:
            event = _event()
            event.record()
            self._events.append((end, event))

    def wait(self) -> None:
        """Returns at once: it is the device's stream that waits."""
        if self._waited:
            return
        self._waited = True
        stream = torch.cuda.current_stream(self._staging.device)
        self._stop.record(stream)
        stream.wait_event(self._copied)
        self._go.record(stream)

    def chunks(self) -> Iterator[memoryview]:
        staging, size = self._staging, self._staging.layout.device_bytes
        if not self._holds_arena:
            staging.arena_free.acquire()
            self._holds_arena = True
        for piece, tensor in self._host:
            ctypes.memmove(staging.arena.address + piece.start, tensor.contiguous().data_ptr(), piece.nbytes)
        if staging.clone is not None:
            with torch.cuda.device(staging.device), torch.cuda.stream(staging.stream):
                for at in range(0, size, GROUP):
                    end = min(at + GROUP, size)
                    staging.flat[at:end].copy_(staging.clone[at:end], non_blocking=True)
                    self._mark(end)
        out, pending = 0, iter(self._events)
        for at in range(0, staging.layout.nbytes, CHUNK):
            end = min(at + CHUNK, staging.layout.nbytes)
            while out < min(end, size):
                out, event = next(pending)
                event.synchronize()
            if out >= size:
                self._give_clone()
            yield staging.arena.view[at:end]

    def device_seconds(self) -> float:
        if not self._waited:
            return 0.0
        self._go.synchronize()
        return float(self._stop.elapsed_time(self._go)) / 1000

    def _give_clone(self) -> None:
        if self._holds_clone:
            self._holds_clone = False
            self._staging.clone_free.release()
        self._sources = []

    def release(self) -> None:
        self._staging.stream.synchronize()  # after a failed write the copy may still be under way
        self._give_clone()
        if self._holds_arena:
            self._holds_arena = False
            self._staging.arena_free.release()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copy_on_device(targets: dict[int, torch.Tensor], sources: Sources) -> None:
    """Large tensors one by one, at the device's full bandwidth; the small ones of one type in one launch, for there are
    hundreds and each launch costs as much as its copy."""
    by_type: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for piece, tensor in sources:
        target = targets[piece.start]
        if piece.nbytes < LARGE and tensor.is_contiguous():
            into, froms = by_type.setdefault(piece.dtype, ([], []))
            into.append(target)
            froms.append(tensor)
        else:
            target.copy_(tensor, non_blocking=True)
    for into, froms in by_type.values():
        torch._foreach_copy_(into, froms, non_blocking=True)
