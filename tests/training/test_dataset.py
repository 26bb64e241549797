"""Order and cut of the batches."""

from __future__ import annotations

import pytest
import torch

from training.dataset import Sampler, extend_digest, fetch, shards_of
from training.spec import BadSpec


def sampler(**changes: int) -> Sampler:
    return Sampler(**({"samples": 50, "batch_size": 12, "shards": 2, "accumulate": 1, "seed": 3} | changes))


def test_an_epoch_takes_each_sample_at_most_once_and_whole_batches_only() -> None:
    one = sampler()
    taken = torch.cat([one.batch(step) for step in range(one.steps_per_epoch)])
    assert one.steps_per_epoch == 4
    assert len(set(taken.tolist())) == len(taken) == 48


def test_order_differs_by_epoch_and_by_seed_and_is_a_function_of_the_step() -> None:
    one, again, other = sampler(), sampler(), sampler(seed=4)
    assert torch.equal(one.batch(5), again.batch(5))
    assert not torch.equal(one.batch(1), one.batch(5))
    assert not torch.equal(one.batch(1), other.batch(1))
    assert torch.equal(one.batch(1), again.batch(1)), "asking for another epoch in between changes nothing"


@pytest.mark.parametrize(("shards", "accumulate"), [(1, 1), (2, 1), (3, 2), (5, 2)])
def test_shards_and_micro_batches_together_are_the_batch(shards: int, accumulate: int) -> None:
    one = sampler(shards=shards, accumulate=accumulate)
    parts = [part for shard in range(shards) for part in one.micro_batches(2, shard)]
    assert [i for part in parts for i in part] == one.batch(2).tolist()
    assert len(parts) == shards * accumulate and all(parts)


def test_a_batch_too_small_for_its_parts_is_refused_with_the_number_it_needs() -> None:
    with pytest.raises(BadSpec, match=r"batch_size is 12.*at least 15"):
        sampler(shards=5, accumulate=3)


def test_data_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(BadSpec, match="10 samples, fewer than"):
        sampler(samples=10)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_shard_has_one_rank(world: int) -> None:
    assert [s for rank in range(world) for s in shards_of(rank, world, 4)] == [0, 1, 2, 3]


def test_more_workers_than_shards_are_refused() -> None:
    with pytest.raises(BadSpec, match="3 workers, but the training has 2 shards"):
        shards_of(0, 3, 2)


def test_fetch_collates_and_uses_getitems_when_there() -> None:
    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
            return [(torch.full((2,), float(i)), i) for i in indices]

    inputs, targets = fetch(Rows(), [4, 7])
    assert inputs.tolist() == [[4.0, 4.0], [7.0, 7.0]] and targets.tolist() == [4, 7]


def test_order_digest_tells_order_and_cut() -> None:
    assert extend_digest(extend_digest("", [1, 2]), [3]) == extend_digest(extend_digest("", [1, 2]), [3])
    assert len({extend_digest(extend_digest("", a), b) for a, b in (([1, 2], [3]), ([1], [2, 3]), ([2, 1], [3]))}) == 3
