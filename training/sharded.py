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
    """Shard in place: blocks in lists and sequences one by one, so that one at a time is gathered, then the rest."""
    from torch.distributed.fsdp import fully_shard  # half a second that other trainings do not pay

    containers = [m for m in model.modules() if isinstance(m, CONTAINERS)]
    blocks = [b for c in containers for b in c if any(True for _ in b.parameters()) and not isinstance(b, CONTAINERS)]
    for module in (*dict.fromkeys(blocks), model):
        sharded = fully_shard(module)
        sharded.set_gradient_divide_factor(1.0)  # the loss is scaled already: gradients are summed
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


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
