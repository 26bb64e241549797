"""Pure: which capacity the next attempt of a training asks for. Spot first, on-demand where spot fails it.

    choose(CapacityPolicy(fallback=True), ledger, now=..., until=..., left=...)      # Choice(spot=..., reason=...)

On-demand is asked for after so many interruptions on spot, after an attempt that got no spot node in time, and when
the time left is less than the training needs. An attempt that found no node of one kind is followed by one of the
other. Every choice is made from the ledger alone, so that whoever runs the loop after a kill makes the same.
Not covered: moving an attempt that runs; prices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.workload import INTERRUPTIONS
from tasks.records import Attempt

SPOT, ON_DEMAND = "spot", "on-demand"
LEAST_WAIT = 1.0  # seconds


@dataclass(frozen=True, kw_only=True)
class CapacityPolicy:
    """What a place says of capacity. The defaults are those of a place that has one kind only."""

    spot: bool = True  # False: on-demand from the first attempt on
    fallback: bool = False  # False: it stays with spot, however often it is taken away and however long it waits
    fallback_after: int = 3  # interruptions on spot; 0: they alone are never a reason
    start_seconds: float | None = None  # how long an attempt waits for its nodes; None: for ever
    margin: float = 1.5  # time that is left / time that is needed, below which the deadline asks for on-demand


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What an attempt asks for, and why."""

    spot: bool
    reason: str  # "" where there is no choice
    start_seconds: float | None = None  # how long it waits for its nodes

    @property
    def capacity(self) -> str:
        """As the ledger names it."""
        return SPOT if self.spot else ON_DEMAND


def choose(
    policy: CapacityPolicy,
    attempts: Sequence[Attempt],
    *,
    now: float,
    until: float | None = None,
    left: float | None = None,
) -> Choice:
    """What the attempt after these asks for. Unix seconds: `now`, `until` (the deadline); `left`: seconds to train."""
    if not policy.spot:
        return Choice(spot=False, reason="on-demand only")
    if not policy.fallback:
        return Choice(spot=True, reason="", start_seconds=policy.start_seconds)
    ended = [a for a in attempts if a.ended is not None]
    last = ended[-1] if ended else None
    taken = sum(a.cause in INTERRUPTIONS and a.capacity == SPOT for a in ended)
    if last is not None and last.cause == "no_capacity":
        other = last.capacity != SPOT
        return Choice(
            spot=other, reason=f"attempt {last.number} got no {last.capacity} node", start_seconds=policy.start_seconds
        )
    slack = None if until is None or left is None else until - now - left * policy.margin
    if slack is not None and slack <= 0:
        assert until is not None
        reason = f"{until - now:.0f} s to the deadline, and {left:.0f} s of training left"
        return Choice(spot=False, reason=reason, start_seconds=policy.start_seconds)
    if policy.fallback_after and taken >= policy.fallback_after:
        return Choice(spot=False, reason=f"interrupted {taken} times on spot", start_seconds=policy.start_seconds)
    waits = [s for s in (policy.start_seconds, slack) if s is not None]
    reason = f"interrupted {taken} times on spot" if taken else "spot first"
    return Choice(spot=True, reason=reason, start_seconds=max(LEAST_WAIT, min(waits)) if waits else None)


def seconds_left(lines: Iterable[Mapping[str, Any]], to_step: int) -> float | None:
    """Seconds of training from `to_step` to the end, by the pace of the trainer's own lines; None if they tell none.

    A start (from the workers' start to the first step) is part of it. What happens between two launches is not.
    """
    seconds, steps, last = 0.0, 0, 0
    start, began = 0.0, None
    before: tuple[int, float] | None = None
    for line in lines:
        if line.get("event") == "started":
            began, before = float(line["time"]), None
        if "event" in line or "max_steps" not in line:
            continue
        step, at, last = int(line["step"]), float(line["time"]), int(line["max_steps"])
        if began is not None:
            start, began = at - began, None
        if before is not None and step > before[0]:
            seconds, steps = seconds + at - before[1], steps + step - before[0]
        before = (step, at)
    return start + max(0, last - to_step) * seconds / steps if steps else None
