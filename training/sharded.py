"""Models too large for one device: FSDP2 shards parameters, gradients and optimizer state over the workers.

One data shard for each worker; sums are FSDP's own reduce-scatter, the same bits at the same number of workers. Resumed
with another number, the checkpoint is resharded, but not to the bit. Same interface as training/reduction.py.
Not covered: tensor and pipeline parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from training.reduction import PeerLost

CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential)


def shard_model(model: torch.nn.Module) -> None:
    """Shard in place: blocks one by one, so that one at a time is gathered whole, then what is left of the model."""
    from torch.distributed.fsdp import fully_shard  # half a second that other trainings do not pay

    for module in (*blocks_of(model), model):
        sharded = fully_shard(module)
        sharded.set_gradient_divide_factor(1.0)  # the loss is scaled already: gradients are summed
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules with parameters that lie in lists and sequences; of nested ones the outer, each once.

    FSDP can't shard a parameter twice. So a block's own sequences belong to it, and a block that shares a parameter
    with a module outside of it is left to the model as a whole.
    """
    blocks: dict[torch.nn.Module, None] = {}

    def walk(module: torch.nn.Module) -> None:
        for child in module.children():
            if isinstance(module, CONTAINERS) and not isinstance(child, CONTAINERS):
                blocks[child] = None
            else:
                walk(child)

    walk(model)
    parts = {block: set(block.modules()) for block in blocks}
    outer = [b for b in blocks if not any(b in parts[other] for other in blocks if other is not b)]

    def alone(block: torch.nn.Module) -> bool:
        mine = set(block.parameters())
        rest = (p for m in model.modules() if m not in parts[block] for p in m.parameters(recurse=False))
        return bool(mine) and mine.isdisjoint(rest)

    return [block for block in outer if alone(block)]


def whole(value: Any) -> Any:
    """The full tensor of a sharded one (collective), anything else as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


class ShardedSum:
    """Gradients summed by FSDP itself; running statistics are averaged, the extras summed."""

    def __init__(self, model: torch.nn.Module, *, shards: int, rank: int, world: int, extras: int) -> None:
        """`shards` is the number of workers; `extras`: how many float32 numbers ride along."""
        self.mine = range(rank, rank + 1)
        self._world = world
        self._params = list(model.parameters())
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]

    def begin_step(self) -> None:
        """Forget the last step's gradients."""
        for parameter in self._params:
            parameter.grad = None

    def begin_shard(self, position: int) -> None:
        """Nothing to prepare: there is one shard."""

    def end_shard(self, position: int) -> None:
        """Nothing to collect: backward has reduced the gradients."""

    def finish(self, extras: Sequence[Sequence[float]]) -> list[float]:
        """Average the buffers and sum the extras over all workers. Raises PeerLost when another rank is gone."""
        told = torch.tensor(extras[0], dtype=torch.float32, device=self._params[0].device)
        try:
            dist.all_reduce(told)
            for buffer in self._buffers:
                dist.all_reduce(buffer)
                buffer.div_(self._world)
        except RuntimeError as error:
            raise PeerLost(str(error).splitlines()[0]) from error
        sums: list[float] = told.tolist()
        return sums
