"""What is told of a checkpoint that was saved or loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A damaged checkpoint that `load` passed over."""

    name: str
    reason: str
    moved_to: str


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A committed checkpoint. `per_rank[r]` is what rank r of the saving world gave; `mine` is this rank's when the
    world has the same size, else None. Right after a save, `per_rank` holds only this rank's."""

    step: int
    complete: bool
    world: int
    name: str
    url: str
    meta: Mapping[str, Any]
    manifest: Manifest
    per_rank: tuple[Any, ...] = ()
    mine: Any = None
    skipped: tuple[Skipped, ...] = ()


def p95(values: Sequence[float]) -> float:
    """The 95th percentile (nearest rank, so a measured value); nan for none."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else math.nan
