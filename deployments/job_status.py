"""Pure: whether a Job or a PyTorchJob has ended, and how, in the words of its conditions.

SuccessCriteriaMet and FailureTarget announce an end and are none; Suspended is waiting. Not covered: pods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ENDS = {"Complete": True, "Succeeded": True, "Failed": False}


@dataclass(frozen=True, kw_only=True)
class JobEnd:
    """The end that a controller has declared."""

    succeeded: bool
    reason: str  # BackoffLimitExceeded, DeadlineExceeded, PodFailurePolicy, PyTorchJobFailed, ...
    message: str


def end_of(item: Mapping[str, Any]) -> JobEnd | None:
    """How it ended; None while it goes on."""
    for condition in (item.get("status") or {}).get("conditions") or ():
        if condition.get("type") in ENDS and condition.get("status") == "True":
            return JobEnd(
                succeeded=ENDS[condition["type"]],
                reason=str(condition.get("reason") or ""),
                message=str(condition.get("message") or ""),
            )
    return None


def is_suspended(item: Mapping[str, Any]) -> bool:
    """Whether somebody, such as a queue, holds it back."""
    spec = item.get("spec") or {}
    if spec.get("suspend") or (spec.get("runPolicy") or {}).get("suspend"):
        return True
    conditions = (item.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == "Suspended" and c.get("status") == "True" for c in conditions)
