"""What holds a workload back before it starts: waited for, or given up with the reason."""

from __future__ import annotations

import time

import pytest

from deployments.cluster import Cluster
from deployments.errors import PreflightError
from deployments.workload import Outcome, Workload
from tests.cluster_kit import Background
from tests.deployments.kube_fake import KubeFake
from tests.deployments.kube_store import JOBS, PODS, Json
from tests.deployments.runner_kit import NAME, POD, step, succeed


def unschedulable(kube: KubeFake, job: Json, text: str) -> None:
    """A pod that the scheduler has no node for, in its words."""
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}
    kube.pod_for(job, node="", phase="Pending", conditions=[condition])


def given_up(kube: KubeFake, cluster: Cluster, workload: Workload) -> Outcome:
    """Its outcome when its object is deleted for it, and with that its pod."""
    run = Background(cluster, workload)
    kube.wait(lambda: kube.count("DELETE", "jobs") == 1)
    kube.remove(PODS, POD)
    return run.end()


def test_a_suspended_job_is_waited_for(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        kube.condition(JOBS, NAME, "Suspended")
        time.sleep(0.5)
        kube.change(JOBS, NAME, conditions=[])
        succeed(kube, job, document={"ok": True})

    kube.on_create[JOBS] = controllers
    assert cluster.run(step()).cause == "complete"


def test_no_capacity_names_what_is_missing(kube: KubeFake, cluster: Cluster) -> None:
    text = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    kube.on_create[JOBS] = lambda job: unschedulable(kube, job, text)
    outcome = given_up(kube, cluster, step(start_seconds=0.5))
    assert outcome.cause == "no_capacity" and outcome.exit_code is None
    assert "Insufficient nvidia.com/gpu" in outcome.reason and not kube.has(JOBS, NAME)


def test_a_place_in_a_queue_is_no_want_of_a_node(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        kube.condition(JOBS, NAME, "Suspended")
        time.sleep(0.8)
        kube.change(JOBS, NAME, conditions=[])
        freed.append(time.time())

    freed: list[float] = []
    kube.on_create[JOBS] = controllers
    outcome = cluster.run(step(start_seconds=0.4))
    assert outcome.cause == "no_capacity" and freed, "not while it was suspended"
    assert outcome.ended - freed[0] > 0.35


def test_an_image_that_cannot_be_pulled_is_a_preflight_error(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        waiting = {"reason": "ErrImagePull", "message": "manifest unknown"}
        status = [{"name": "step", "image": "reg/x:1", "state": {"waiting": waiting}}]
        kube.pod_for(job, phase="Pending", containerStatuses=status)

    kube.on_create[JOBS] = controllers
    with pytest.raises(PreflightError, match="reg/x:1 cannot be pulled"):
        given_up(kube, cluster, step())


def test_a_claim_that_is_not_there_is_a_preflight_error(kube: KubeFake, cluster: Cluster) -> None:
    text = '0/3 nodes are available: persistentvolumeclaim "reprise" not found. preemption: not helpful.'
    kube.on_create[JOBS] = lambda job: unschedulable(kube, job, text)
    with pytest.raises(PreflightError, match="create the claim reprise"):
        given_up(kube, cluster, step())
