"""Ranks that save or load one checkpoint together say to each other how it went.

One kind of collective only, so that ranks at different places of the protocol find out instead of hanging.
Not covered: agreeing on when to save (training/reduction.py).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


class Agreement:
    """All ranks construct one. `group` must be a gloo group that nothing else uses; by default one is made."""

    def __init__(self, rank: int, world: int, group: Any = None) -> None:
        self.rank, self.world = rank, world
        self._group = dist.new_group(backend="gloo") if world > 1 and group is None else group

    def gather(self, kind: str, value: Any) -> list[Any]:
        """Every rank's value, in rank order. Raises RuntimeError when another rank is at another `kind` of step."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, (kind, value), group=self._group)
        if len(kinds := {entry[0] for entry in found}) > 1:
            raise RuntimeError(f"ranks disagree what to checkpoint: {sorted(kinds)}; all must save the same state")
        return [entry[1] for entry in found]

    def first(self, value: Any) -> Any:
        """Rank 0's value."""
        return self.gather("agree", value)[0]
