"""Attempts of a training: what an interruption, a lost node, a bug or a success of one pod makes of the others."""

from __future__ import annotations

import time
from pathlib import Path

from deployments.cluster import Cluster
from tests.cluster_kit import Background
from tests.deployments.kube_fake import KubeFake
from tests.deployments.kube_store import NODES, PODS, TRAININGS, Json, timestamp
from tests.deployments.runner_kit import ATTEMPT, training

MASTER = f"{ATTEMPT}-master-0"
WORKERS = [f"{ATTEMPT}-worker-{index}" for index in range(2)]


def attempt(kube: KubeFake, item: Json, *, workers: int = 0) -> None:
    """The operator's pods; the master is on spot capacity only where it is alone."""
    kube.pod_for(item, MASTER, node="n1" if not workers else "cpu", container="pytorch")
    for index in range(workers):
        kube.pod_for(item, WORKERS[index], node=f"n{index + 1}", container="pytorch")


def end(kube: KubeFake, pod: str, code: int, **terminated: str) -> None:
    kube.end_pod(pod, code, container="pytorch", **terminated)


def taint(kube: KubeFake, name: str, key: str, effect: str) -> None:
    node = kube.get(NODES, name)
    node["spec"] = {"taints": [{"key": key, "effect": effect}]}
    kube.put(NODES, node)


def disrupt(kube: KubeFake, pod: str, reason: str) -> None:
    """Told to leave, with five seconds of grace."""
    kube.condition(PODS, pod, "DisruptionTarget", reason)
    item = kube.get(PODS, pod)
    item["metadata"] |= {"deletionTimestamp": timestamp(-5), "deletionGracePeriodSeconds": 5}
    kube.put(PODS, item)


def test_an_evicted_attempt_is_spot_and_tells_notice_and_node(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(item: Json) -> None:
        attempt(kube, item)
        taint(kube, "n1", "karpenter.sh/disrupted", "NoSchedule")
        disrupt(kube, MASTER, "EvictionByEvictionAPI")
        kube.condition(TRAININGS, ATTEMPT, "Failed", "PyTorchJobFailed")
        time.sleep(0.3)
        end(kube, MASTER, 143)

    kube.on_create[TRAININGS] = controllers
    outcome = cluster.run(training())
    assert (outcome.cause, outcome.exit_code, outcome.node, outcome.capacity) == ("spot", 143, "n1", "spot")
    assert outcome.notice is not None and abs(outcome.notice - time.time()) < 5
    again = cluster.run(training())
    assert (again.cause, again.adopted) == ("spot", True)  # its end is told again, nothing is started
    assert kube.count("POST", "pytorchjobs") == 2


def test_the_rest_of_an_attempt_is_told_to_leave_and_waited_for(kube: KubeFake, cluster: Cluster) -> None:
    kube.foreground = {PODS}
    kube.on_create[TRAININGS] = lambda item: attempt(kube, item, workers=2)
    run = Background(cluster, training(replicas=3))
    kube.wait(lambda: kube.has(PODS, WORKERS[1]))
    disrupt(kube, WORKERS[1], "EvictionByEvictionAPI")
    kube.condition(TRAININGS, ATTEMPT, "Failed", "PyTorchJobFailed")
    kube.wait(lambda: "deletionTimestamp" in kube.get(PODS, MASTER)["metadata"])
    kube.wait(lambda: "deletionTimestamp" in kube.get(PODS, WORKERS[0])["metadata"])
    end(kube, WORKERS[1], 143)
    end(kube, WORKERS[0], 143)
    time.sleep(0.3)
    assert not run.found  # the master still saves
    end(kube, MASTER, 143)
    kube.remove(PODS, MASTER)
    outcome = run.end()
    assert (outcome.cause, outcome.node, outcome.capacity) == ("spot", "n2", "spot")


def test_a_node_that_vanished_is_node_lost_without_a_notice(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(item: Json) -> None:
        attempt(kube, item, workers=1)
        end(kube, MASTER, 143)  # its peer is gone
        kube.condition(TRAININGS, ATTEMPT, "Failed", "PyTorchJobFailed")
        time.sleep(0.2)
        kube.remove(NODES, "n1")
        disrupt(kube, WORKERS[0], "DeletionByPodGC")
        kube.change(PODS, WORKERS[0], phase="Failed")
        kube.remove(PODS, WORKERS[0])

    kube.on_create[TRAININGS] = controllers
    kube.foreground = {PODS}
    outcome = cluster.run(training(replicas=2))
    assert (outcome.cause, outcome.node, outcome.exit_code, outcome.notice) == ("node_lost", "n1", None, None)


def test_a_bug_is_a_bug_although_its_peers_leave(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(item: Json) -> None:
        attempt(kube, item, workers=1)
        kube.logs[WORKERS[0]] = ["2026-01-01T00:00:00Z training.launch: exit 1: worker 1: ValueError"]
        end(kube, WORKERS[0], 1, message="ValueError")
        kube.condition(TRAININGS, ATTEMPT, "Failed", "PyTorchJobFailed")
        time.sleep(0.2)
        end(kube, MASTER, 143)

    kube.on_create[TRAININGS] = controllers
    kube.foreground = {PODS}
    outcome = cluster.run(training(replicas=2))
    assert (outcome.cause, outcome.exit_code) == ("user_error", 1)
    assert "training.launch: exit 1: worker 1: ValueError" in Path(outcome.log).read_text()


def test_out_of_memory(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(item: Json) -> None:
        attempt(kube, item)
        end(kube, MASTER, 137, reason="OOMKilled")
        kube.condition(TRAININGS, ATTEMPT, "Failed")

    kube.on_create[TRAININGS] = controllers
    outcome = cluster.run(training())
    assert (outcome.cause, outcome.exit_code) == ("out_of_memory", 137)
    assert "raise memory" in outcome.reason


def test_success_waits_for_the_workers_and_then_ends_them(kube: KubeFake, cluster: Cluster) -> None:
    kube.foreground = {PODS}
    kube.on_create[TRAININGS] = lambda item: attempt(kube, item, workers=1)
    run = Background(cluster, training(replicas=2, grace_seconds=0.5))
    kube.wait(lambda: kube.has(PODS, WORKERS[0]))
    end(kube, MASTER, 0)
    kube.condition(TRAININGS, ATTEMPT, "Succeeded")
    kube.wait(lambda: kube.get(PODS, WORKERS[0])["metadata"].get("deletionTimestamp"), 10)
    end(kube, WORKERS[0], 143)
    assert run.end().cause == "complete"


def test_a_pod_that_vanished_before_the_operator_saw_it_ends_the_attempt(kube: KubeFake, cluster: Cluster) -> None:
    kube.on_create[TRAININGS] = lambda item: attempt(kube, item)
    run = Background(cluster, training())
    kube.wait(lambda: kube.has(PODS, MASTER))
    kube.remove(PODS, MASTER)
    outcome = run.end()
    assert outcome.cause == "node_lost" and not kube.has(TRAININGS, ATTEMPT)


def test_an_attempt_whose_end_nobody_saw(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(item: Json) -> None:
        kube.condition(TRAININGS, ATTEMPT, "Failed", "PyTorchJobFailed", "1 Master replica(s) failed")

    kube.on_create[TRAININGS] = controllers
    outcome = cluster.run(training())
    assert outcome.cause == "spot" and "while nobody watched" in outcome.reason


def test_a_pod_on_a_dead_node_is_given_up(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(item: Json) -> None:
        attempt(kube, item)
        pod = kube.get(PODS, MASTER)
        pod["metadata"]["deletionTimestamp"] = timestamp(1)
        kube.put(PODS, pod)
        taint(kube, "n1", "node.kubernetes.io/unreachable", "NoExecute")
        kube.condition(TRAININGS, ATTEMPT, "Failed")

    kube.on_create[TRAININGS] = controllers
    kube.foreground = {PODS}
    assert cluster.run(training()).cause == "node_lost"
