"""One row of a training's ledger: opened before an attempt is launched, closed with what came of it.

What the trainer reached and saved is read from its own progress lines, how it ended from the place's outcome.
Not covered: how many attempts there may be (train_model.py), which capacity they ask for (capacity.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deployments.workload import Outcome
from tasks.capacity import Choice
from tasks.records import Attempt


def open_attempt(attempts: Sequence[Attempt], choice: Choice, *, now: float) -> Attempt:
    """The row after these, for an attempt that is about to be launched. Unix seconds."""
    last = attempts[-1] if attempts else None
    return Attempt(
        number=last.number + 1 if last else 1,
        started=now,
        from_step=last.to_step if last else 0,
        idle_seconds=round(now - last.ended, 3) if last and last.ended else 0.0,
        capacity=choice.capacity,
        asked=choice.reason,
    )


def close_attempt(attempt: Attempt, outcome: Outcome, progress: str) -> Attempt:
    """Fill the row from what the trainer said of this attempt; what it did not say stays at its default.

    `progress`: the file of its JSON lines.
    """
    lines = [e for e in progress_of(progress) if float(e.get("time", 0)) >= attempt.started]
    committed = [int(e["step"]) for e in lines if e.get("event") in ("checkpoint", "saved", "resumed", "complete")]
    reached = [int(e["step"]) for e in lines if "step" in e]
    resumed = [int(e["step"]) for e in lines if e.get("event") == "resumed"]
    saved = [float(e["time"]) for e in lines if e.get("event") == "saved"]
    restarts = sum(e.get("event") == "restarted" for e in lines)
    again = f"; workers started again {restarts} times within it" if restarts else ""
    from_step = resumed[0] if resumed else attempt.from_step
    waited = outcome.cause == "no_capacity"  # it had no node to tell the capacity of
    return replace(
        attempt,
        ended=outcome.ended,
        cause=outcome.cause,
        reason=_why(outcome) + again,
        exit_code=outcome.exit_code,
        from_step=from_step,
        to_step=max([from_step, *committed]),
        reached_step=max([from_step, *reached]),
        notice_to_saved=round(saved[-1] - outcome.notice, 3) if saved and outcome.notice else None,
        node="" if waited else outcome.node,
        capacity=attempt.capacity if waited else outcome.capacity or attempt.capacity,
    )


def progress_of(path: str) -> list[dict[str, Any]]:
    """The trainer's JSON lines over all attempts. A line cut by a kill is left out."""
    lines: list[dict[str, Any]] = []
    try:
        text = Path(path).read_text()
    except (FileNotFoundError, IsADirectoryError):  # not begun, or "": told not to
        return lines
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _why(outcome: Outcome) -> str:
    """The trainer's own last word, where it had one."""
    if outcome.cause != "user_error" or not outcome.log:
        return outcome.reason
    try:
        lines = Path(outcome.log).read_text(errors="replace").splitlines()
    except OSError:
        return outcome.reason
    said = [line.partition(": exit ")[2] for line in lines if line.startswith("training.launch: exit ")]
    return f"exit {said[-1]}; its log is {outcome.log}" if said else f"{outcome.reason}; its log is {outcome.log}"
