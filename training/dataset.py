"""Which samples each step takes, as a pure function of (seed, step): nothing to save, nothing to lose.

Every epoch is a permutation drawn from (seed, epoch). A step takes the next `batch_size` of it, whatever the number of
workers; the batch is cut into fixed shards, a shard into micro batches. Resuming at step N means asking for step N.
The rest of an epoch that fills no batch is left out, another one each epoch, so that the global batch never changes.
Not covered: reading ahead in other processes; a data set should be cheap to index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from training.random_state import derive
from training.spec import BadSpec


class Sampler:
    """Sample order of a training. Steps count from 0."""

    def __init__(self, *, samples: int, batch_size: int, shards: int, accumulate: int, seed: int) -> None:
        """Raises BadSpec when a batch does not fill its micro batches or the data does not fill a batch."""
        if batch_size < shards * accumulate:
            raise BadSpec(
                f"[train] batch_size is {batch_size}, but {shards} shards x {accumulate} micro batches (accumulate) "
                f"need at least {shards * accumulate}: raise batch_size or lower accumulate"
            )
        if samples < batch_size:
            raise BadSpec(
                f"the training split has {samples} samples, fewer than [train] batch_size = {batch_size}: "
                f"lower batch_size to at most {samples}"
            )
        self.samples, self.batch_size, self.shards, self.accumulate, self.seed = (
            samples,
            batch_size,
            shards,
            accumulate,
            seed,
        )
        self.steps_per_epoch = samples // batch_size
        self._epoch = -1
        self._order: torch.Tensor = torch.empty(0, dtype=torch.int64)

    def epoch(self, step: int) -> int:
        """The epoch that step belongs to, from 0."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> torch.Tensor:
        """The indices of the global batch of that step: int64, shape (batch_size,)."""
        if (epoch := self.epoch(step)) != self._epoch:
            generator = torch.Generator().manual_seed(derive(self.seed, "epoch", epoch))
            self._order, self._epoch = torch.randperm(self.samples, generator=generator), epoch
        first = (step % self.steps_per_epoch) * self.batch_size
        return self._order[first : first + self.batch_size]

    def micro_batches(self, step: int, shard: int) -> list[list[int]]:
        """The indices that one shard takes at that step, as `accumulate` micro batches of nearly equal size."""
        mine = self.batch(step).tensor_split(self.shards)[shard]
        return [part.tolist() for part in mine.tensor_split(self.accumulate)]


def fetch(data: Dataset[Any], indices: Sequence[int]) -> tuple[Any, Any]:
    """The samples of these indices as one batch (input, target), collated as torch's DataLoader does."""
    get_all = getattr(data, "__getitems__", None)
    samples = get_all(list(indices)) if get_all else [data[i] for i in indices]
    inputs, targets = default_collate(samples)
    return inputs, targets


def extend_digest(digest: str, indices: Sequence[int]) -> str:
    """The digest of a shard's sample order, one micro batch longer."""
    return hashlib.sha256(f"{digest}:{','.join(map(str, indices))}".encode()).hexdigest()


def shards_of(rank: int, world: int, shards: int) -> range:
    """The shards that a rank works for, in order: contiguous, nearly equal in number.

    Raises BadSpec when there are fewer shards than workers.
    """
    if shards < world:
        raise BadSpec(
            f"{world} workers, but the training has {shards} shards: start at most {shards} workers, or begin a "
            f"training with [train] shards set to the most workers it will ever have"
        )
    return range(rank * shards // world, (rank + 1) * shards // world)
