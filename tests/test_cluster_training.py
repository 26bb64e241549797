"""Attempts of a training as PyTorchJobs on a real Kubernetes API, with a trainer that only counts: causes and saves.

Not covered: the real trainer and its weights (test_cluster_resume.py).
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from deployments.cluster import Cluster
from deployments.cluster_place import ClusterPlace
from deployments.workload import Workload
from tests.cluster_kit import SMALL, Background, needs_rig, node_of, reclaim, running_pods, training

pytestmark = pytest.mark.cluster


def test_an_attempt_of_two_nodes(cluster: Cluster) -> None:
    outcome = cluster.run(training("train-two-1", "two", 5, replicas=2))
    assert (outcome.cause, outcome.exit_code) == ("complete", 0), outcome.reason
    assert outcome.capacity == "spot"


def test_an_attempt_reclaimed_with_notice(cluster: Cluster) -> None:
    needs_rig()
    run = Background(cluster, training("train-notice-1", "notice", 100_000))
    run.until_line("starts at 0")
    node = node_of(cluster, "train-notice-1")
    told = time.time()
    spot = reclaim(node, "--notice", "20")
    outcome = run.end()
    spot.wait(60)
    assert (outcome.cause, outcome.exit_code, outcome.node) == ("spot", 143, node), outcome.reason
    assert outcome.notice is not None and abs(outcome.notice - told) < 5
    assert any("saved" in line for line in run.lines)
    again = cluster.run(training("train-notice-1", "notice", 100_000))
    assert (again.cause, again.adopted) == ("spot", True)
    resumed = Background(cluster, training("train-notice-2", "notice", 100_000))
    resumed.until_line("starts at")
    assert "starts at 0" not in resumed.lines
    cluster.stop("train-notice-2")
    assert resumed.end().cause == "cancelled"


def test_a_worker_reclaimed_without_notice_ends_the_attempt_and_its_peers_save(cluster: Cluster) -> None:
    needs_rig()
    run = Background(cluster, training("train-lost-1", "lost", 100_000, replicas=2))
    run.until_line("starts at 0")
    node = node_of(cluster, "train-lost-1", "worker-0")
    spot = reclaim(node, "--no-notice")
    outcome = run.end(180)
    spot.wait(60)
    assert (outcome.cause, outcome.node, outcome.notice) == ("node_lost", node, None), outcome.reason
    assert any("saved" in line for line in run.lines)  # the master was told to leave
    assert running_pods(cluster, "train-lost-1") == []


def test_a_bug_of_a_training(cluster: Cluster) -> None:
    wanted = training("train-bug-1", "bug", 1)
    outcome = cluster.run(
        Workload(
            name=wanted.name,
            image="train",
            command=("python", "-c", "raise ValueError('no')"),
            resources=SMALL,
            labels=wanted.labels,
        )
    )
    assert (outcome.cause, outcome.exit_code) == ("user_error", 1) and "ValueError: no" in outcome.reason


def test_no_spot_capacity(cluster: Cluster, place: ClusterPlace) -> None:
    nowhere = Cluster(replace(place, spot_selector={"karpenter.sh/capacity-type": "none"}), api=cluster.api)
    outcome = nowhere.run(training("train-none-1", "none", 1, start_seconds=6.0))
    assert outcome.cause == "no_capacity" and "karpenter.sh/capacity-type=none" in outcome.reason
    nowhere.close()
