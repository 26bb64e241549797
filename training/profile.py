"""Where the time of a step goes: a torch.profiler trace of a few steps, and a verdict in one sentence.

    with StepProfile(folder, device, enabled=spec.profile and rank == 0) as profile:
        for ...:
            with profile.part("data"): batch = fetch(...)
            ...
            profile.step()

It waits for the pace to settle, records some steps and writes `trace.json.gz` (chrome://tracing, ui.perfetto.dev) and
`verdict.json`. Nothing random is drawn, so weights stay the same to the bit. A profiler that fails never fails a
training: the verdict says so. Not covered: memory, several ranks (rank 0 stands for all), whole runs (`reprise gpu`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from training.verdict import FILE, TRACE

WAIT, WARMUP, ACTIVE = 5, 3, 10  # steps: until the pace has settled, until the profiler has, recorded
PREFIX = "reprise."
STEP = PREFIX + "step"
MUCH = 0.2  # a share of the time that is worth a person's attention
BUSY = 0.8  # a GPU that computes so much of the time is used well
SMALL_KERNEL = 10.0  # microseconds; below it the launch costs more than the work
TOP = 8


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the recorded steps say. Shares are of their wall time, 0..1."""

    steps: int
    step_seconds: float
    data: float  # waiting for the data
    gpu_busy: float | None  # a kernel or copy runs on the GPU; None without one
    copy: float  # copies to the GPU
    kernels_per_step: float
    kernel_microseconds: float  # mean
    sentence: str
    top: list[tuple[str, float]] = field(default_factory=list)  # operations by their own time


class StepProfile:
    """Records some steps of a loop; a disabled one does nothing."""

    def __init__(
        self,
        folder: str | Path,
        device: torch.device,
        *,
        enabled: bool,
        wait: int = WAIT,
        warmup: int = WARMUP,
        active: int = ACTIVE,
    ) -> None:
        """`folder`: where trace and verdict go; made if it is not there."""
        self.folder, self.device = Path(folder), device
        self.verdict: Verdict | None = None
        self._first, self._last = wait + warmup, wait + warmup + active
        self._wait, self._taken = wait, 0
        self._profiler: Any = None
        self._mark: Any = None
        self._enabled = enabled

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def part(self, name: str) -> AbstractContextManager[Any]:
        """Mark a part of a step, such as "data"."""
        if self._profiler is None:
            return contextlib.nullcontext()
        return torch.profiler.record_function(PREFIX + name)

    def step(self) -> None:
        """Tell that a step has been taken."""
        if not self._enabled:
            return
        self._taken += 1
        if self._profiler is None:
            if self._taken == self._wait:
                self._guarded(self._start)
            return
        self._close_mark()
        if self._taken >= self._last:
            self._finish()
        else:
            self._open_mark()

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        # Without a schedule: one throws away what was recorded when a training ends in between.
        profiler = torch.profiler.profile(activities=activities)
        profiler.start()
        self._profiler = profiler
        self._open_mark()

    def _open_mark(self) -> None:
        self._mark = torch.profiler.record_function(STEP)
        self._mark.__enter__()

    def _close_mark(self) -> None:
        mark, self._mark = self._mark, None
        if mark is not None:
            mark.__exit__(None, None, None)

    def _finish(self) -> None:
        profiler, self._profiler, self._enabled = self._profiler, None, False
        if profiler is not None:
            self._close_mark()
            self._guarded(lambda: self._write(profiler))

    def _write(self, profiler: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.verdict = judge(
            (_span(e) for e in profiler.events() or ()),
            skip=self._first - self._wait,
            whole=self._taken - self._wait,
        )
        if self.verdict is not None:
            aside = self.folder / "trace.aside.json.gz"
            profiler.export_chrome_trace(str(aside))
            os.replace(aside, self.folder / TRACE)
        told = asdict(self.verdict) if self.verdict else {"sentence": "too few steps to profile"}
        (self.folder / FILE).write_text(json.dumps(told, indent=1) + "\n")

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except Exception as error:  # whatever the profiler of this driver cannot do: the training goes on
            self._enabled, self._profiler = False, None
            print(f"training: no profile: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Span:
    """One event of the profiler. Microseconds."""

    name: str
    start: float
    end: float
    on_gpu: bool
    own: float  # without its children


def _span(event: Any) -> Span:
    on_gpu = event.device_type.name != "CPU"
    own = (event.time_range.end - event.time_range.start) if on_gpu else event.self_cpu_time_total
    return Span(name=event.name, start=event.time_range.start, end=event.time_range.end, on_gpu=on_gpu, own=float(own))


def judge(spans: Iterable[Span], *, skip: int = 0, whole: int | None = None) -> Verdict | None:
    """Pure: what recorded steps say; None if there is no whole step.

    `skip`: steps at the beginning in which the profiler warms up. `whole`: how many were taken to their end.
    """
    spans = list(spans)
    steps = sorted((s for s in spans if s.name == STEP and not s.on_gpu), key=lambda s: s.start)[skip:whole]
    if not steps:
        return None
    begin, end = min(s.start for s in steps), max(s.end for s in steps)
    wall = end - begin
    if wall <= 0:
        return None
    inside = [s for s in spans if s.end > begin and s.start < end and s.name != STEP]
    work = [s for s in inside if s.on_gpu and not s.name.startswith(PREFIX)]
    kernels = [s for s in work if not s.name.startswith(("Memcpy", "Memset"))]
    copies = [s for s in work if s.name.startswith("Memcpy HtoD")]
    data = _covered([s for s in inside if s.name == PREFIX + "data" and not s.on_gpu], begin, end) / wall
    busy = _covered(work, begin, end) / wall if work else None
    copy = _covered(copies, begin, end) / wall
    mean = sum(s.end - s.start for s in kernels) / len(kernels) if kernels else 0.0
    top: Counter[str] = Counter()
    for s in kernels or [s for s in inside if not s.name.startswith(PREFIX)]:
        top[s.name[:80]] += max(0, round(s.own))
    seconds = wall / len(steps) / 1e6
    return Verdict(
        steps=len(steps),
        step_seconds=round(seconds, 6),
        data=round(data, 3),
        gpu_busy=None if busy is None else round(busy, 3),
        copy=round(copy, 3),
        kernels_per_step=round(len(kernels) / len(steps), 1),
        kernel_microseconds=round(mean, 2),
        sentence=_sentence(data, busy, copy, mean, seconds),
        top=[(name, round(own / wall, 3)) for name, own in top.most_common(TOP)],
    )


def _covered(spans: Iterable[Span], begin: float, end: float) -> float:
    """Time that at least one of the spans covers: streams and threads overlap."""
    total, reached = 0.0, begin
    for span in sorted(spans, key=lambda s: s.start):
        start, stop = max(span.start, reached), min(span.end, end)
        if stop > start:
            total += stop - start
            reached = stop
    return total


def _sentence(data: float, busy: float | None, copy: float, mean: float, seconds: float) -> str:
    pace = f"{seconds * 1000:.3g} ms a step"
    if data > MUCH:
        return f"data loading: {data:.0%} of {pace}; keep the data in memory, or decode it before training"
    if busy is None:
        return f"on the CPU, {pace}: {1 - data:.0%} of it is computation"
    if busy >= BUSY:
        return f'well used: the GPU works {busy:.0%} of {pace}; precision = "bfloat16" or compile = true may help'
    if copy > MUCH:
        return f"copies to the GPU: {copy:.0%} of {pace}; send smaller types (uint8 images) and convert them there"
    if mean < SMALL_KERNEL:
        return (
            f"small batch: the GPU works {busy:.0%} of {pace}, in kernels of {mean:.1f} us; raise batch_size, or set "
            "compile = true"
        )
    return f"the CPU is behind: the GPU works {busy:.0%} of {pace} and waits for Python in between; set compile = true"
