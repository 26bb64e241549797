"""A step that is ended from outside: by `stop`, by its deadline, by the Job controller."""

from __future__ import annotations

import threading
import time

from deployments.cluster import Cluster
from tests.cluster_kit import Background
from tests.deployments.kube_fake import KubeFake
from tests.deployments.kube_store import JOBS, PODS, Json
from tests.deployments.runner_kit import NAME, POD, created, step


def stopped(kube: KubeFake, cluster: Cluster) -> tuple[Background, threading.Thread]:
    """A step that `stop` ends in another thread, up to its pod and its Job being gone."""
    kube.foreground = {JOBS, PODS}
    run = Background(cluster, step())
    pod = kube.pod_for(created(kube))["metadata"]["name"]
    stopping = threading.Thread(target=cluster.stop, args=(NAME,), kwargs={"grace_seconds": 2})
    stopping.start()
    kube.wait(lambda: kube.get(PODS, pod)["metadata"].get("deletionGracePeriodSeconds") == 2)
    kube.end_pod(pod, 143)
    kube.remove(PODS, pod)
    kube.remove(JOBS, NAME)
    return run, stopping


def test_stop_ends_it_as_cancelled_and_is_idempotent(kube: KubeFake, cluster: Cluster) -> None:
    run, stopping = stopped(kube, cluster)
    outcome = run.end()
    stopping.join(5)
    assert (outcome.cause, outcome.exit_code, outcome.reason) == ("cancelled", 143, "somebody stopped it")
    cluster.stop(NAME)


def test_a_pod_that_its_watch_tells_of_after_its_jobs_end_still_tells_the_exit_code(
    kube: KubeFake, cluster: Cluster
) -> None:
    """The watches of Jobs and Pods are two streams: with both away, only the late events know how the pod ended."""
    kube.silent = {PODS}
    run, stopping = stopped(kube, cluster)
    time.sleep(0.5)
    kube.silent = set()
    assert (run.end().cause, run.end().exit_code) == ("cancelled", 143)
    stopping.join(5)


def test_deadline(kube: KubeFake, cluster: Cluster) -> None:
    kube.on_create[JOBS] = lambda job: kube.pod_for(job)
    run = Background(cluster, step(deadline_seconds=0.3))
    kube.wait(lambda: kube.count("DELETE", "jobs") == 1)
    kube.end_pod(POD, 143)
    outcome = run.end()
    assert (outcome.cause, outcome.exit_code) == ("deadline", 143)


def test_the_job_controllers_own_deadline(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        kube.end_pod(kube.pod_for(job)["metadata"]["name"], 143)
        kube.condition(JOBS, NAME, "Failed", "DeadlineExceeded")

    kube.on_create[JOBS] = controllers
    assert cluster.run(step(deadline_seconds=60)).cause == "deadline"
