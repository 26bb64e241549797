"""The ordered sum, with one rank in this process; several ranks are in test_launch.py."""

from __future__ import annotations

import torch

from training.reduction import OrderedSum, PeerLost, is_lost_peer


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1, bias=False))


def accumulate(net: torch.nn.Module, sums: OrderedSum, batches: list[torch.Tensor]) -> list[float]:
    sums.begin_step()
    extras = []
    for position, batch in enumerate(batches):
        sums.begin_shard(position)
        loss = net(batch).pow(2).mean() / len(batches)
        loss.backward()
        sums.end_shard(position)
        extras.append([float(loss.detach()), 1.0])
    return sums.finish(extras)


def test_sum_over_shards_is_the_gradient_of_the_mean_and_extras_are_added() -> None:
    batches = list(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)))
    plain, summed = model(), model()
    sum(plain(b).pow(2).mean() / 2 for b in batches).backward()
    told = accumulate(summed, OrderedSum(summed, shards=2, rank=0, world=1, extras=2), batches)
    for expected, found in zip(plain.parameters(), summed.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    assert told[1] == 2.0 and told[0] > 0


def test_every_shard_starts_from_the_same_buffers_and_their_mean_remains() -> None:
    batches = list(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)))
    alone = []
    for batch in batches:
        net = model()
        net(batch)
        alone.append(net[1].running_mean.clone())  # type: ignore[index]
    net = model()
    accumulate(net, OrderedSum(net, shards=2, rank=0, world=1, extras=2), batches)
    torch.testing.assert_close(net[1].running_mean, (alone[0] + alone[1]) / 2)  # type: ignore[index]
    assert int(net[1].num_batches_tracked) == 1  # type: ignore[index]


def test_a_second_step_forgets_the_first() -> None:
    batches = list(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)))
    net = model()
    sums = OrderedSum(net, shards=2, rank=0, world=1, extras=2)
    accumulate(net, sums, batches)
    first = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    accumulate(net, sums, batches)
    for before, parameter in zip(first, net.parameters(), strict=True):
        assert torch.equal(before, parameter.grad)  # type: ignore[arg-type]


def test_parameters_of_another_type_and_frozen_ones() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2).to(torch.float64), torch.nn.Linear(2, 1).to(torch.float64))
    net[0].requires_grad_(False)
    sums = OrderedSum(net, shards=1, rank=0, world=1, extras=1)
    sums.begin_step()
    sums.begin_shard(0)
    net(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    sums.end_shard(0)
    sums.finish([[0.0]])
    assert net[0].weight.grad is None
    assert net[1].bias.grad is not None
    assert net[1].bias.grad.dtype == torch.float64 and net[1].bias.grad.item() == 2.0


def test_what_counts_as_a_lost_peer() -> None:
    assert is_lost_peer(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert issubclass(PeerLost, RuntimeError)
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_peer(ValueError("gloo"))
