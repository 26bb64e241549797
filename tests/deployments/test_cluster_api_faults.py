"""An API server that is away, refuses or cuts its watches, and what waiting for many workloads asks of it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from deployments.cluster import Cluster
from deployments.errors import PreflightError, Unreachable
from tests.cluster_kit import Background
from tests.deployments.kube_fake import KubeFake
from tests.deployments.kube_store import JOBS, TRAININGS
from tests.deployments.runner_kit import ATTEMPT, NAME, PLACE, created, step, succeed, three_nodes, training


@pytest.mark.parametrize(("status", "headers"), [(429, {"Retry_After": "0.1"}), (500, {}), (503, {}), (0, {})])
def test_an_api_server_in_trouble_is_asked_again(
    kube: KubeFake, cluster: Cluster, status: int, headers: dict[str, str]
) -> None:
    kube.fail("POST", "/jobs", status, times=2, **headers)
    kube.fail("GET", "/jobs", status, times=2, **headers)
    kube.on_create[JOBS] = lambda job: succeed(kube, job, document={"ok": True})
    outcome = cluster.run(step())
    assert outcome.cause == "complete" and not outcome.adopted


def test_an_api_server_that_is_away_for_three_seconds(kube: KubeFake, cluster: Cluster) -> None:
    run = Background(cluster, step())
    job = created(kube)
    time.sleep(0.2)
    kube.stop()
    succeed(kube, job, document={"ok": True})  # it went on meanwhile
    time.sleep(3)
    kube.start()
    assert run.end().cause == "complete"


def test_an_api_server_that_stays_away_says_so_and_the_workload_runs_on(kube: KubeFake, tmp_path: Path) -> None:
    three_nodes(kube)
    place = Cluster(PLACE, kubeconfig=kube.kubeconfig(tmp_path), patience=0.5)
    run = Background(place, step())
    kube.wait(lambda: kube.has(JOBS, NAME))
    time.sleep(0.2)
    kube.stop()
    with pytest.raises(Unreachable, match="has not answered for"):
        run.end()
    assert kube.has(JOBS, NAME)
    place.close()


def test_watches_that_are_cut_repeat_or_are_too_old(kube: KubeFake, cluster: Cluster) -> None:
    kube.duplicates, kube.cut_after = True, 1
    run = Background(cluster, step())
    pod = kube.pod_for(created(kube))["metadata"]["name"]
    time.sleep(0.3)
    kube.oldest = kube.version + 3
    kube.cut()  # the next watch gets 410 and lists again
    kube.end_pod(pod, 0, message='{"ok": true}')
    kube.condition(JOBS, NAME, "Complete")
    kube.put(JOBS, {"metadata": {"name": "x"}})
    assert run.end().result == {"ok": True}


def test_a_missing_right_prints_the_rule(kube: KubeFake, cluster: Cluster) -> None:
    said = 'jobs.batch is forbidden: User "u" cannot create resource "jobs" in API group "batch" in the namespace "ns"'
    kube.fail("POST", "/jobs", 403, message=said)
    rule = r'Role: \{"apiGroups": \["batch"\], "resources": \["jobs"\], "verbs": \["create"\]\}'
    with pytest.raises(PreflightError, match=rule):
        cluster.run(step())


def test_a_watch_that_is_forbidden_ends_the_run(kube: KubeFake, cluster: Cluster) -> None:
    said = 'pods is forbidden: User "u" cannot watch resource "pods" in API group "" in the namespace "ns"'
    kube.fail("GET", "/pods.*watch=1", 403, message=said, times=5)
    with pytest.raises(PreflightError, match=r'"resources": \["pods"\], "verbs": \["watch"\]'):
        cluster.run(step())


def test_credentials_that_are_refused(kube: KubeFake, cluster: Cluster) -> None:
    kube.fail("GET", "/jobs", 401, message="Unauthorized", times=5)
    with pytest.raises(PreflightError, match="refused our credentials"):
        cluster.run(step())


def test_a_cluster_without_the_operator(kube: KubeFake, cluster: Cluster) -> None:
    kube.missing.add(TRAININGS)
    with pytest.raises(PreflightError, match=r"no PyTorchJob.*install") as refused:
        cluster.run(training())
    pinned = Path(__file__).parents[2] / "deployments/k8s/components/training-operator/operator/kustomization.yaml"
    (version,) = re.findall(r"\?ref=(v[0-9.]+)", str(refused.value))
    assert f"training-operator/manifests/overlays/standalone?ref={version}\n" in pinned.read_text()
    cluster.stop(ATTEMPT)  # and stopping what cannot be there is no error


def test_many_workloads_share_one_watch_a_kind(kube: KubeFake, cluster: Cluster) -> None:
    kube.on_create[JOBS] = lambda job: succeed(kube, job, document={"ok": True})
    runs = [Background(cluster, step(f"pull-data-{number}")) for number in range(20)]
    assert {run.end().cause for run in runs} == {"complete"}
    assert kube.count("GET", r"/jobs\?.*watch=1") == 1
    assert kube.count("GET", r"/pods\?.*watch=1") == 1
    assert kube.count("POST", "jobs") == 20
