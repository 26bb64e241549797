"""How often to save: Young/Daly's interval from the measured stall and the observed interruptions, within bounds.

The interval that loses least is about sqrt(2 x cost x MTBF) (Young 1974; Daly 2006 gives the next terms). What a save
costs is measured every time: its stall, and where hashing and writing compete with the training, how much longer the
steps take meanwhile. The time between interruptions starts from the spec's guess, which counts as one observation,
and each attempt's end corrects it. `grace_fit` tells before it hurts when a save does not fit into the notice.
Not covered: saving (training/checkpoint.py) and who says that an attempt was interrupted (the ledger).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from training.spec import CheckpointPolicy

TORCHRUN_KILLS_AFTER = 30.0  # seconds torchrun leaves the other workers when one has died; not configurable in 2.13
FIRST_STALL = 0.1  # seconds: assumed until the first save was measured
KEPT = 32  # measurements


def best_interval(stall: float, mtbf: float) -> float:
    """Daly's interval between saves in seconds, for a stall and a mean time between interruptions in seconds."""
    if stall >= 2 * mtbf:
        return mtbf
    ratio = math.sqrt(stall / (2 * mtbf))
    return math.sqrt(2 * stall * mtbf) * (1 + ratio / 3 + ratio * ratio / 9) - stall


def observed_mtbf(guess: float, seconds: float, interruptions: int) -> float:
    """Seconds between interruptions: the guess as one observation, and those seen in `seconds` of training."""
    return (guess + seconds) / (1 + interruptions)


@dataclass(kw_only=True)
class Cadence:
    """Decides when the next save is due. Times in seconds; `now` is any monotonic clock."""

    policy: CheckpointPolicy
    mtbf: float
    last_save: float  # on that clock; the start of the loop counts as one

    def __post_init__(self) -> None:
        self.stalls: list[float] = []
        self.saves: list[float] = []
        self.idle: list[float] = []  # seconds of steps without a save under way
        self.extras: list[float] = []  # seconds that the steps during each save took longer, together
        self._during: list[float] = []

    def stepped(self, seconds: float, *, saving: bool) -> None:
        """One step of the loop, stall included, and whether a save was under way."""
        if saving:
            self._during.append(seconds)
        else:
            self.idle = [*self.idle, seconds][-KEPT:]

    def measured(self, *, stall: float, durable: float | None = None) -> None:
        """One save: how long the loop stood still, and how long until the checkpoint was durable."""
        self.stalls = [*self.stalls, stall][-KEPT:]
        if durable is not None:
            self.saves = [*self.saves, durable][-KEPT:]
        if self.idle and self._during:
            extra = sum(self._during) - len(self._during) * fmean(self.idle)
            self.extras = [*self.extras, extra][-KEPT:]
        self._during = []

    @property
    def stall(self) -> float:
        """The typical stall: the median of what was measured."""
        return sorted(self.stalls)[len(self.stalls) // 2] if self.stalls else FIRST_STALL

    @property
    def cost(self) -> float:
        """What one save costs the training: its stall, or more where the steps beside it are slowed down."""
        return max(self.stall, fmean(self.extras)) if self.extras else self.stall

    @property
    def interval(self) -> float:
        """Seconds between saves, within the policy's bounds; min_seconds until the first save was measured."""
        if not self.stalls:
            return self.policy.min_seconds
        best = best_interval(self.cost, self.mtbf)
        return min(max(best, self.policy.min_seconds), self.policy.max_seconds)

    def due(self, step: int, now: float, *, busy: bool = False) -> bool:
        """Whether to save after `step` (counted from 1), which begins now. By time: after the step that ends nearest to
        the interval, never before min_seconds, and not while the last save is still being written."""
        if self.policy.every_steps:
            return step % self.policy.every_steps == 0
        length = fmean(self.idle) if self.idle else 0.0
        wanted = max(self.interval - length / 2, self.policy.min_seconds)
        return not busy and now + length - self.last_save >= wanted


def p95(values: list[float]) -> float:
    """The 95th percentile (the largest of fewer than 20); 0 when nothing was measured."""
    return sorted(values)[max(0, math.ceil(0.95 * len(values)) - 1)] if values else 0.0


def grace_fit(saves: list[float], step_seconds: float, *, notice: float, grace: float) -> str:
    """A warning when a save cannot fit in what the platform leaves between notice and end; empty when it fits.

    `saves`: seconds from the call to durable. What must fit is the running step, then one save.
    """
    need = step_seconds + p95(saves)
    limits = {
        "the platform's notice ([train.checkpoint] notice)": notice,
        "the grace period of the place ([spot] grace)": grace,
        "torchrun's restart path": TORCHRUN_KILLS_AFTER,
    }
    name, limit = min(limits.items(), key=lambda item: item[1])
    if not saves or need <= limit:
        return ""
    return (
        f"a step and a save take {need:.1f} s (95th percentile), but {name} leaves {limit:g} s: an interruption will "
        f"lose the steps since the last periodic save. Give it more time, save to a faster store, or lower "
        f"[train.checkpoint] max_interval"
    )
