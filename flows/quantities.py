"""Durations, memory sizes and planned interruptions as people write them in TOML: "30s", "512Mi", "notice@35%".

Pure text to value; every refusal is a ValueError that says what is expected. Not covered: where the text stands in a
file (flows.settings_errors).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+")
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi|Ti|k|M|G|T|)")
_INTERRUPTION = re.compile(r"(notice|kill)@(\d+(?:\.\d+)?)%")


@dataclass(frozen=True, kw_only=True)
class Interruption:
    """One interruption that the place plays in a rehearsal of the spot market."""

    kind: Literal["notice", "kill"]  # SIGTERM and the grace, or SIGKILL of the whole tree at once
    at: float  # share of the training's steps, 0..1

    def __str__(self) -> str:
        return f"{self.kind}@{self.at * 100:g}%"


def parse_duration(value: Any) -> float:
    """ "90s", "1h30m", "250ms" -> seconds. Raises ValueError for anything else, numbers without a unit included."""
    expected = 'expected a duration such as "5s", "250ms", "10m" or "1h30m" (units ms, s, m, h, d)'
    if not isinstance(value, str):
        raise ValueError(f"{expected}, in quotes")
    if not _DURATION.fullmatch(value):
        raise ValueError(f"{expected}, without spaces or a sign")
    return sum(float(n) * _SECONDS[unit] for n, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", value))


def parse_memory(value: Any) -> int:
    """A Kubernetes memory quantity ("512Mi", "2G") -> bytes. Raises ValueError for anything else, and for zero."""
    expected = 'expected a memory size such as "512Mi" or "2Gi" (units Ki, Mi, Gi, Ti, or k, M, G, T)'
    match = _MEMORY.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(expected if isinstance(value, str) else f"{expected}, in quotes")
    size = int(float(match[1]) * _BYTES[match[2]])
    if size < 1:
        raise ValueError(f"{expected}, greater than zero")
    return size


def parse_interruption(value: Any) -> Interruption:
    """ "notice@35%" or "kill@70%" -> Interruption. Raises ValueError for anything else."""
    match = _INTERRUPTION.fullmatch(value) if isinstance(value, str) else None
    if match is None or float(match[2]) > 100:
        raise ValueError('expected "notice@P%" or "kill@P%", P from 0 to 100 per cent of the training\'s steps')
    return Interruption(kind="notice" if match[1] == "notice" else "kill", at=float(match[2]) / 100)
