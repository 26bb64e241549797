"""How the report says lengths of time, moments, numbers and the ends of attempts: pure, a word at a time.

Times are UTC, lengths have units; the terminal says them alike (flows.display). Not covered: which of them a page needs
(tasks.report_page, tasks.report_timeline).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.workload import INTERRUPTIONS

CAUSES = {
    "complete": "complete",
    "spot": "spot reclaim",
    "consolidation": "consolidation",
    "node_lost": "node lost",
    "out_of_memory": "out of memory",
    "user_error": "error",
    "no_capacity": "no capacity",
    "cancelled": "cancelled",
    "deadline": "deadline",
    "": "running",
}
NO_END = ("complete", "", "no_capacity")  # nothing that ran was ended early


def duration(seconds: float | None) -> str:
    """A length of time for people: '12 ms', '3.4 s', '2 min 05 s', '1 h 02 min'."""
    if seconds is None:
        return "–"
    if seconds < 0.00995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def moment(unix: float | None) -> str:
    """A point in time for people, in UTC; an en dash when there is none."""
    return time.strftime("%d %b %Y, %H:%M:%S UTC", time.gmtime(unix)) if unix else "–"


def number(value: Any) -> str:
    """A metric for people: four digits that matter, counts as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f") if abs(value) >= 10000 else str(int(value))
    return f"{value:.4g}"


def count(n: int, word: str) -> str:
    """'1 step', '2 steps'."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def steps_lost(attempt: Mapping[str, Any]) -> int:
    """Steps that this attempt trained and no checkpoint kept."""
    return max(0, int(attempt.get("reached_step", 0)) - int(attempt.get("to_step", 0)))


def interruptions(attempts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The attempts that the platform ended."""
    return [a for a in attempts if a.get("cause") in INTERRUPTIONS]


def safe_link(url: Any) -> str:
    """An http address as it is, anything else as nothing: a page must not run what a document says."""
    text = str(url or "")
    return text if text.startswith(("http://", "https://")) else ""
