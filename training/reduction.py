"""Gradients of fixed shards, summed in the order of the shards, whatever the number of workers.

A ring all-reduce adds in an order that depends on the number of ranks, and DDP on when its buckets are ready, so the
last bits of the weights change when a job is resized or resumed. Here every rank sends each other rank one chunk of its
shards' gradients (all-to-all), each adds its chunk shard by shard, and the sums are gathered: the bytes of a ring
all-reduce when every rank has one shard, and the same bits at every world size.
Floating buffers (batch norm's running statistics) are averaged the same way; a few extra numbers (loss, flags) ride
along, so that the ranks agree on saving and stopping without a collective of its own.
Not covered: overlap of communication with the backward pass; models sharded by FSDP (training/sharded.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from training.dataset import shards_of


class PeerLost(RuntimeError):
    """A collective failed: another rank is gone, and this one can neither go on nor save together with it."""


class OrderedSum:
    """The flat gradient buffers of one rank's shards and their sum over all shards."""

    def __init__(self, model: torch.nn.Module, *, shards: int, rank: int, world: int, extras: int) -> None:
        """`extras`: how many float32 numbers ride along. Buffers are allocated once, for life."""
        self.shards, self.rank, self.world = shards, rank, world
        self.mine = shards_of(rank, world, shards)
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]
        self._counters = [b for b in model.buffers() if not b.is_floating_point()]
        sizes = [t.numel() for t in (*self._params, *self._buffers)]
        self._used = sum(sizes) + extras
        self._chunk = -(-self._used // world)
        self._extras = slice(sum(sizes), self._used)
        device = self._params[0].device
        self._local = torch.zeros(len(self.mine), self._chunk * world, device=device)
        self._total = torch.zeros(self._chunk * world, device=device)
        if world > 1:
            self._received = torch.empty(shards, self._chunk, device=device)
            self._sent = self._local if len(self.mine) == 1 else torch.empty_like(self._local)
        self._views = [self._cut(row) for row in (*self._local, self._total)]
        self._before = [b.clone() for b in (*self._buffers, *self._counters)]

    def _cut(self, flat: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        views, first = [], 0
        for tensor in (*self._params, *self._buffers):
            views.append(flat[first : first + tensor.numel()].view_as(tensor))
            first += tensor.numel()
        return views[: len(self._params)], views[len(self._params) :]

    def begin_step(self) -> None:
        """Forget the last step's gradients and remember the buffers that every shard starts from."""
        self._local.zero_()
        for kept, now in zip(self._before, (*self._buffers, *self._counters), strict=True):
            kept.copy_(now)

    def begin_shard(self, position: int) -> None:
        """Let backward accumulate into the buffer of this rank's shard number `position`."""
        for parameter, view in zip(self._params, self._views[position][0], strict=True):
            # autograd wants gradients of the parameter's type; others are copied over in end_shard
            parameter.grad = view if parameter.dtype == view.dtype else None
        if position:
            for kept, now in zip(self._before, (*self._buffers, *self._counters), strict=True):
                now.copy_(kept)

    def end_shard(self, position: int) -> None:
        """Collect what backward and forward left outside the flat buffer."""
        gradients, buffers = self._views[position]
        for parameter, view in zip(self._params, gradients, strict=True):
            if parameter.grad is not None and parameter.grad is not view:
                view.copy_(parameter.grad)
        for now, view in zip(self._buffers, buffers, strict=True):
            view.copy_(now).div_(self.shards)

    def finish(self, extras: Sequence[Sequence[float]]) -> list[float]:
        """Sum over all shards; afterwards every parameter's .grad is that sum, on every rank, and buffers agree.

        `extras[position]` are the numbers of each of this rank's shards; returns their sums over all shards.
        Raises PeerLost when another rank is gone.
        """
        self._local[:, self._extras] = torch.tensor(extras, dtype=torch.float32)
        self._sum_in_order()
        gradients, buffers = self._views[-1]
        for parameter, view in zip(self._params, gradients, strict=True):
            parameter.grad = view if parameter.dtype == view.dtype else view.to(parameter.dtype)
        for now, view in zip(self._buffers, buffers, strict=True):
            now.copy_(view)
        sums: list[float] = self._total[self._extras].tolist()
        return sums

    def _sum_in_order(self) -> None:
        if self.world == 1:
            self._total.copy_(self._local[0])
            for row in self._local[1:]:
                self._total.add_(row)
            return
        if self._sent is not self._local:  # by receiver first, then by shard
            by_rank = self._local.view(len(self.mine), self.world, self._chunk).transpose(0, 1)
            self._sent.view(self.world, len(self.mine), self._chunk).copy_(by_rank)
        sizes = [len(shards_of(r, self.world, self.shards)) * self._chunk for r in range(self.world)]
        mine = [len(self.mine) * self._chunk] * self.world
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # named so until 2.12
        try:
            dist.all_to_all_single(self._received.view(-1), self._sent.view(-1), sizes, mine)
            chunk = self._received[0]
            for row in self._received[1:]:
                chunk.add_(row)
            all_gather(self._total, chunk)
        except RuntimeError as error:
            raise PeerLost(str(error).splitlines()[0]) from error


def is_lost_peer(error: BaseException) -> bool:
    """Whether a failure comes from a broken connection between ranks: gloo and NCCL tell it in words only."""
    words = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(w in words for w in ("gloo", "Connection closed by peer", "NCCL"))
    )
