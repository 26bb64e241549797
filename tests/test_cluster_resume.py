"""The real trainer on nodes that are taken away: the same weights to the bit, each cause in the ledger, no error spent.

Not covered: the words for an end (test_cluster_training.py). Needs the rig.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster import Cluster
from tasks.capacity import CapacityPolicy
from tasks.train_model import TrainedModel
from tests.cluster_trainings import NONE, NOTICE, STEPS, Bench, bench_on, uninterrupted

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
Quiet = Mapping[str, Any]


@pytest.fixture
def bench_of(cluster: Cluster, shared: Path) -> Iterator[Callable[[str], Bench]]:
    """Makes benches with nodes of a pool of that name."""
    made: list[Bench] = []

    def make(pool: str) -> Bench:
        made.append(bench_on(cluster, shared, pool))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    """The result of an uninterrupted training."""
    return uninterrupted(tmp_path_factory.mktemp("quiet"))


def same(trained: TrainedModel, quiet: Quiet) -> None:
    """Bit-identical weights, and what follows from them."""
    expected = (quiet["weights_sha256"], quiet["metrics"], STEPS)
    assert (trained.weights_sha256, trained.metrics, trained.steps) == expected


def test_nodes_are_taken_in_every_way(bench_of: Callable[[str], Bench], quiet: Quiet) -> None:
    """Two trainings side by side, since most of the time goes into waiting until a lost pod is given up."""
    with ThreadPoolExecutor(2) as pool:
        found = [
            pool.submit(one_node, bench_of("one"), quiet),
            pool.submit(two_nodes, bench_of("two"), quiet),
        ]
    for each in found:
        each.result()


def one_node(bench: Bench, quiet: Quiet) -> None:
    """With notice, without, and during a save. The fourth attempt asks for on-demand, as the policy says."""
    policy = CapacityPolicy(fallback=True, fallback_after=3, start_seconds=300.0)
    request = bench.request("b", module="slow_disk.py", params={"slow": 0.03, "fsync": 0.6}, capacity=policy)
    trained, rows = bench.train(
        request,
        {
            1: bench.take(request, "master", how=NOTICE),
            2: bench.take(request, "master", how=NONE),
            3: bench.take(request, "master", how=NONE, at="saving"),
        },
    )
    expected = [("spot", "spot"), ("node_lost", "spot"), ("node_lost", "spot"), ("complete", "on-demand")]
    assert [(r.cause, r.capacity) for r in rows] == expected
    assert rows[0].exit_code == 143 and rows[0].to_step == rows[0].reached_step  # it saved on notice
    assert rows[3].asked == "interrupted 3 times on spot" and "asks for on-demand" in " ".join(bench.said)
    assert len({r.node for r in rows}) == 4 and all("-spot-" in r.node for r in rows[:3])
    cut = [e for e in bench.lines(request, rows[2]) if e.get("event") == "saving"]
    assert cut and cut[-1]["step"] > rows[2].to_step, "the save that was cut does not count"
    assert (trained.attempts, trained.interruptions) == (4, 3)
    same(trained, quiet)


def two_nodes(bench: Bench, quiet: Quiet) -> None:
    """Two nodes with a worker each: the worker's with notice, the master's without, both at once without."""
    request = bench.request("c", params={"slow": 0.06}, nodes=2)
    trained, rows = bench.train(
        request,
        {
            1: bench.take(request, "worker-0", how=NOTICE),
            2: bench.take(request, "master", how=NONE),
            3: bench.take(request, "master", "worker-0", how=NONE),
        },
    )
    assert [r.cause for r in rows] == ["spot", "node_lost", "node_lost", "complete"]
    assert rows[0].exit_code == 143 and rows[0].to_step == rows[0].reached_step
    assert "-spot-" in rows[0].node and "-on-demand-" in rows[1].node
    assert [r.capacity for r in rows[:2]] == ["spot", "on-demand"]
    assert trained.interruptions == 3
    same(trained, quiet)


def test_spot_capacity_is_gone(bench_of: Callable[[str], Bench], quiet: Quiet) -> None:
    """Its nodes are cordoned: it waits, asks for on-demand, and the ledger says both."""
    bench = bench_of("gone")
    request = bench.request("d", capacity=CapacityPolicy(fallback=True, start_seconds=6.0))
    for node in bench.nodes("spot"):
        path, body = f"/api/v1/nodes/{node}", {"spec": {"unschedulable": True}}
        bench.home.api.request("PATCH", path, body=body, content_type="application/merge-patch+json")
    began = time.time()
    trained, rows = bench.train(request)
    assert [(r.capacity, r.cause, r.asked) for r in rows] == [
        ("spot", "no_capacity", "spot first"),
        ("on-demand", "complete", "attempt 1 got no spot node"),
    ]
    assert 5.0 < (rows[0].ended or 0) - began < 15.0 and rows[0].node == "" and "-on-demand-" in rows[1].node
    assert "no node within 6 s" in rows[0].reason
    assert trained.interruptions == 0
    same(trained, quiet)
