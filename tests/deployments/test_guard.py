"""The Runner's look before it creates: what it refuses, what it lets pass, and what that costs, on a scripted API."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster import Cluster
from deployments.cluster_place import ClusterPlace
from deployments.errors import PreflightError
from deployments.guard import Guard
from deployments.kube_connect import connect
from deployments.manifests import manifest
from deployments.workload import Outcome, Resources, Workload
from tests.deployments.kube_fake import KubeFake
from tests.deployments.kube_store import JOBS, NAMESPACES, NODES, PODS, ROOM, TRAININGS

Json = dict[str, Any]
PLACE = ClusterPlace(namespace="ns", images={"step": "reprise-step", "train": "reprise-train"})
SPOT = {"karpenter.sh/capacity-type": "spot"}
POOLS, MARKS = "/apis/karpenter.sh/v1/nodepools", "/api/v1/namespaces/kube-system/configmaps"
QUOTAS = "/api/v1/namespaces/ns/resourcequotas"
CAPACITY = {"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["spot", "on-demand"]}
NO_GPU = {"cpu": "8", "memory": "32Gi", "pods": "20"}


def node(kube: KubeFake, name: str = "n1", **allocatable: str) -> None:
    status = {"allocatable": {**NO_GPU, **allocatable}}
    kube.put(NODES, {"metadata": {"name": name, "labels": SPOT}, "spec": {}, "status": status})


def pool(kube: KubeFake, **spec: Any) -> None:
    kube.groups["karpenter.sh"] = {"v1": ["nodepools"]}
    kube.put(
        POOLS, {"metadata": {"name": "gpu-spot"}, "spec": {"template": {"spec": {"requirements": [CAPACITY]}}, **spec}}
    )


def mark(kube: KubeFake) -> None:
    kube.put(MARKS, {"metadata": {"name": "cluster-autoscaler-status", "namespace": "kube-system"}})


def training(number: int = 1, **more: Any) -> Workload:
    given: dict[str, Any] = {"spot": True, "resources": Resources(gpus=1), "grace_seconds": 5.0}
    command = ("python", "-m", "training.launch", "--spec", "{request}")
    labels = {"key": "0123456789ab", "step": "train_model"}
    name = f"train-0123456789ab-{number}"
    return Workload(**{"name": name, "image": "train", "command": command, "labels": labels, **given, **more})


@pytest.fixture
def cluster(kube: KubeFake, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(PLACE, api=connect(kubeconfig=kube.kubeconfig(tmp_path), patience=6.0))
    made.state = None
    yield made
    made.close()
    made.api.close()


def run(kube: KubeFake, cluster: Cluster, workload: Workload, lines: list[str] | None = None) -> Outcome:
    """With controllers that let it succeed."""
    collection, container = (TRAININGS, "pytorch") if workload.image == "train" else (JOBS, "step")

    def controllers(item: Json) -> None:
        pod = kube.pod_for(item, container=container)["metadata"]["name"]
        kube.end_pod(pod, 0, container=container)
        kube.condition(collection, item["metadata"]["name"], "Succeeded" if container == "pytorch" else "Complete")

    kube.on_create[collection] = controllers
    return cluster.run(workload, on_line=(lines if lines is not None else []).append)


def test_what_no_node_can_take_is_refused_and_nothing_is_made(kube: KubeFake, cluster: Cluster) -> None:
    node(kube)
    with pytest.raises(PreflightError, match=r"no node has nvidia.com/gpu.*; fix: install") as refused:
        cluster.run(training())
    assert refused.value.exit_code == 3
    assert kube.count("POST", "") == 0


def test_a_refusal_takes_three_questions(kube: KubeFake, cluster: Cluster) -> None:
    node(kube)
    guard = Guard(cluster.api, PLACE)
    with pytest.raises(PreflightError):
        guard.check(manifest(training(), PLACE))
    asked = [path.partition("?")[0] for _, path in kube.requests]
    assert sorted(asked) == sorted([NODES, "/apis/karpenter.sh", f"{MARKS}/cluster-autoscaler-status"])


def test_a_step_is_looked_at_too(kube: KubeFake, cluster: Cluster) -> None:
    node(kube)
    big = training(name="pull-data-1", image="step", resources=Resources(cpus=64))
    with pytest.raises(PreflightError, match="a pod asks for 64 cpu, and node n1 gives 8 at most"):
        cluster.run(big)
    assert kube.count("POST", "") == 0


def test_a_pool_at_zero_is_no_fault(kube: KubeFake, cluster: Cluster) -> None:
    node(kube)
    pool(kube)
    assert run(kube, cluster, training()).cause == "complete"


def test_no_nodes_at_all_and_a_pool_is_no_fault(kube: KubeFake, cluster: Cluster) -> None:
    pool(kube)
    assert run(kube, cluster, training()).cause == "complete"


def test_a_pool_that_could_never_make_the_node_is_a_fault(kube: KubeFake, cluster: Cluster) -> None:
    node(kube)
    pool(kube, limits={"nvidia.com/gpu": "0"})
    with pytest.raises(PreflightError, match=r"nvidia\.com/gpu"):
        cluster.run(training())
    assert kube.count("POST", "") == 0


def test_an_old_karpenter_is_given_the_benefit_of_the_doubt(kube: KubeFake, cluster: Cluster) -> None:
    node(kube)
    kube.groups["karpenter.sh"] = {"v1beta1": ["nodepools"]}
    assert run(kube, cluster, training()).cause == "complete"


def test_a_cluster_autoscaler_may_make_the_node(kube: KubeFake, cluster: Cluster) -> None:
    node(kube)
    mark(kube)
    lines: list[str] = []
    assert run(kube, cluster, training(), lines).cause == "complete"
    told = [line for line in lines if "preflight: resources: " in line]
    assert len(told) == 1 and "the cluster autoscaler may make one" in told[0]


@pytest.mark.parametrize("path", [r"^/api/v1/nodes", r"^/apis/karpenter.sh", "/configmaps/cluster-autoscaler"])
def test_what_may_not_be_read_refuses_nothing(path: str, kube: KubeFake, cluster: Cluster) -> None:
    node(kube)
    message = 'cannot list resource "nodes" in API group "" at the cluster scope'
    kube.fail("GET", path, 403, times=99, message=message)
    assert run(kube, cluster, training()).cause == "complete"


@pytest.mark.parametrize(("autoscaler", "refused"), [("yes", False), ("no", True)])
def test_cluster_toml_has_the_last_word_on_autoscalers(
    autoscaler: str, refused: bool, kube: KubeFake, tmp_path: Path
) -> None:
    node(kube)
    mark(kube)
    place = ClusterPlace(namespace="ns", images=PLACE.images, autoscaler=autoscaler)
    cluster = Cluster(place, api=connect(kubeconfig=kube.kubeconfig(tmp_path), patience=6.0))
    cluster.state = None
    try:
        if refused:
            with pytest.raises(PreflightError):
                cluster.run(training())
        else:
            assert run(kube, cluster, training()).cause == "complete"
    finally:
        cluster.close()
        cluster.api.close()


def test_a_node_that_was_taken_comes_back_so_a_later_attempt_is_not_refused(
    kube: KubeFake, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.guard.BELIEVED", 0.0)
    node(kube, **{"nvidia.com/gpu": "1"})
    assert run(kube, cluster, training(1)).cause == "complete"
    kube.remove(NODES, "n1")
    assert run(kube, cluster, training(2)).cause == "complete"
    with pytest.raises(PreflightError, match="the cluster has no nodes"):
        cluster.run(training(name="train-ba9876543210-1", labels={"key": "ba9876543210"}))


def test_an_attempt_that_waits_only_so_long_is_refused_only_where_the_other_capacity_fails_too(
    kube: KubeFake, cluster: Cluster
) -> None:
    node(kube)
    plain = {"labels": {"karpenter.sh/capacity-type": "on-demand"}}
    with pytest.raises(PreflightError, match="no node has"):
        cluster.run(training(start_seconds=0.5))
    status = {"allocatable": {**NO_GPU, "nvidia.com/gpu": "1"}}
    kube.put(NODES, {"metadata": {"name": "n2", **plain}, "spec": {}, "status": status})
    lines: list[str] = []
    assert cluster.run(training(start_seconds=0.5), on_line=lines.append).cause == "no_capacity"
    assert any("preflight: " in line for line in lines)
    assert run(kube, cluster, training(2, spot=False, start_seconds=5.0)).cause == "complete"


def test_what_is_there_is_adopted_without_a_look(
    kube: KubeFake, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.guard.BELIEVED", 0.0)
    node(kube, **{"nvidia.com/gpu": "1"})
    assert run(kube, cluster, training()).cause == "complete"
    assert cluster.run(training()).adopted
    assert kube.count("GET", r"^/api/v1/nodes\?") == 1


@pytest.mark.parametrize(
    ("collection", "item", "match"),
    [
        (QUOTAS, {"spec": {"hard": {"requests.nvidia.com/gpu": "0"}}}, "quota"),
        (
            NAMESPACES,
            {"status": {"phase": "Terminating"}},
            "namespace ns is being deleted",
        ),
    ],
)
def test_what_admission_would_refuse_is_refused_too(
    collection: str, item: Json, match: str, kube: KubeFake, cluster: Cluster
) -> None:
    node(kube, **{"nvidia.com/gpu": "1"})
    kube.put(collection, {"metadata": {"name": "ns"}, **item})
    with pytest.raises(PreflightError, match=match):
        cluster.run(training())
    assert kube.count("POST", "") == 0


def test_what_daemonsets_take_counts_and_what_others_hold_is_a_wait(kube: KubeFake, cluster: Cluster) -> None:
    node(kube, **{"nvidia.com/gpu": "1"})
    holder = {"containers": [{"name": "c", "resources": {"limits": {"nvidia.com/gpu": "1"}}}], "nodeName": "n1"}
    kube.put("/api/v1/pods", {"metadata": {"name": "holder", "namespace": "other"}, "spec": holder})
    lines: list[str] = []
    assert run(kube, cluster, training(), lines).cause == "complete"
    assert any("free capacity" in line and "other/holder (1)" in line for line in lines)
    owner = {"ownerReferences": [{"kind": "DaemonSet", "uid": "d"}]}
    cluster.guard._seen = None  # type: ignore[union-attr]
    kube.put("/api/v1/pods", {"metadata": {"name": "holder", "namespace": "other", **owner}, "spec": holder})
    with pytest.raises(PreflightError, match=r"nvidia\.com/gpu"):
        cluster.run(training(name="train-ba9876543210-1", labels={"key": "ba9876543210"}))


def test_many_at_once_share_a_look_and_a_refusal_never_comes_from_an_old_one(kube: KubeFake, cluster: Cluster) -> None:
    node(kube, **ROOM)
    outcomes: list[Outcome] = []

    def one(number: int) -> None:
        key = f"{number:012d}"
        outcomes.append(run(kube, cluster, training(name=f"train-{key}-1", labels={"key": key})))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [o.cause for o in outcomes] == ["complete"] * 12
    assert kube.count("GET", r"^/api/v1/nodes\?") == 1
    large = training(name="train-ba9876543210-1", labels={"key": "b"}, resources=Resources(gpus=16))
    node(kube, "n2", **{"nvidia.com/gpu": "16"})
    assert run(kube, cluster, large).cause == "complete"
    assert kube.count("GET", r"^/api/v1/nodes\?") == 2


def test_without_a_guard_nothing_is_asked(kube: KubeFake, tmp_path: Path) -> None:
    cluster = Cluster(PLACE, api=connect(kubeconfig=kube.kubeconfig(tmp_path), patience=6.0), guard=False)
    cluster.state = None
    try:
        assert run(kube, cluster, training()).cause == "complete"
        assert kube.count("GET", r"^/api/v1/nodes\?") == 0
    finally:
        cluster.close()
        cluster.api.close()


def test_an_api_server_that_restarts_is_waited_for(kube: KubeFake, cluster: Cluster) -> None:
    node(kube, **{"nvidia.com/gpu": "1"})
    kube.fail("GET", r"^/api/v1/nodes\?", 503, times=2)
    assert run(kube, cluster, training()).cause == "complete"
    assert kube.has(PODS, "train-0123456789ab-1-abcde")
