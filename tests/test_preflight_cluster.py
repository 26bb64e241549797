"""The preflight against a real API server and a real scheduler: what it foretells is what then happens.

    KUBECONFIG=... pytest -m cluster tests/test_preflight_cluster.py

Nothing is run: pods are created, the scheduler's word is read, and they are deleted. Not covered: kubelets (that a
time-sliced node refuses a request above one is theirs to do); rights, how soon it speaks (test_preflight_cluster_*.py).
"""

from __future__ import annotations

import time

import pytest

from deployments.cluster_place import ClusterPlace
from deployments.errors import GiveUp, PreflightError
from deployments.kube_api import ApiStatus, KubeApi
from deployments.manifests import manifest
from deployments.preflight import preflight
from deployments.preflight_findings import Finding, wanted
from deployments.snapshot_take import take
from deployments.workload import Workload
from tests.preflight_cluster_kit import GPU, MIG, OURS, Json, Nodes, make, training

pytestmark = pytest.mark.cluster
BY_SCHEDULER = {
    "taints",
    "node selector",
    "node affinity",
    "resources",
    "cordoned nodes",
    "nodes",
    "free capacity",
    "storage zone",
}
GPU_TAINT = {"key": "nvidia.com/gpu", "value": "true", "effect": "NoSchedule"}
# name: nodes, changes of the workload, what the preflight names ("" = it is silent)
CASES: dict[str, tuple[list[Json], Json, str]] = {
    "a whole GPU": ([{"resources": GPU, "taints": [GPU_TAINT]}], {}, ""),
    "a MIG slice": (
        [{"resources": MIG, "taints": [GPU_TAINT]}],
        {"resources": {"gpu_resource": "nvidia.com/mig-1g.10gb"}},
        "",
    ),
    "a share of a GPU": ([{"resources": {"nvidia.com/gpu": "4"}, "labels": {"nvidia.com/gpu.replicas": "4"}}], {}, ""),
    "two nodes": (
        [{"resources": GPU, "capacity": "on-demand"}, {"resources": GPU}, {"resources": GPU}],
        {"replicas": 3},
        "pod security",
    ),
    "another taint": (
        [{"resources": GPU, "taints": [GPU_TAINT, {"key": "team", "effect": "NoSchedule"}]}],
        {},
        "taints",
    ),
    "cordoned": ([{"resources": GPU, "cordoned": True}], {}, "cordoned nodes"),
    "on-demand only": ([{"resources": GPU, "capacity": "on-demand"}], {}, "node selector"),
    "a MIG slice of another size": (
        [{"resources": MIG}],
        {"resources": {"gpu_resource": "nvidia.com/mig-3g.40gb"}},
        "resources",
    ),
    "whole GPUs where there are slices": ([{"resources": MIG}], {}, "resources"),
    "more GPUs than a node has": ([{"resources": GPU}], {"resources": {"gpus": 2}}, "resources"),
    "more memory than a node has": ([{"resources": GPU}], {"resources": {"memory": "64Gi"}}, "resources"),
    "no nodes of ours": ([{"resources": GPU, "labels": dict.fromkeys(OURS, "other")}], {}, "node selector"),
}


def rows(api: KubeApi, workload: Workload, place: ClusterPlace) -> list[Finding]:
    """What the preflight says about places and admission; the operator is no part of these tests."""
    found = preflight(take(api, place), [workload], place)
    return [f for f in found if f.verdict != "OK" and f.what not in ("PyTorchJob",)]


def scheduler_says(api: KubeApi, workload: Workload, place: ClusterPlace) -> tuple[bool, str, float]:
    """Whether all pods of the workload get a node, in whose words if not, and after how many seconds that was known."""
    root, made = f"/api/v1/namespaces/{place.namespace}/pods", []
    item = wanted(manifest(workload, place))
    began = time.monotonic()
    try:
        for pods in item.sets:
            for index in range(pods.count):
                name = f"{workload.name}-{pods.role.lower()}-{index}"
                metadata = {**pods.template["metadata"], "name": name}
                make(api, root, {"kind": "Pod", "metadata": metadata, "spec": pods.spec})
                made.append(name)
        until = time.monotonic() + 30
        while True:
            seen = [api.get(f"{root}/{name}") for name in made]
            conditions = [
                c for p in seen for c in (p.get("status") or {}).get("conditions") or () if c["type"] == "PodScheduled"
            ]
            if refused := [c for c in conditions if c["status"] == "False"]:
                return False, refused[0].get("message", ""), time.monotonic() - began
            if all(p["spec"].get("nodeName") for p in seen):
                return True, "", time.monotonic() - began
            assert time.monotonic() < until, "the scheduler said nothing"
            time.sleep(0.02)
    except (ApiStatus, GiveUp, PreflightError) as error:
        return False, str(error), time.monotonic() - began
    finally:
        for name in made:
            api.delete(f"{root}/{name}", propagation="Background", grace=0)
        gone = time.monotonic() + 20
        while made and any(api.find(f"{root}/{name}") for name in made):
            assert time.monotonic() < gone
            time.sleep(0.05)


@pytest.mark.parametrize("name", CASES)
def test_the_preflight_and_the_scheduler_agree(
    name: str, api: KubeApi, strict_place: ClusterPlace, nodes: Nodes
) -> None:
    told, changes, what = CASES[name]
    for index, node in enumerate(told):
        nodes.add(f"n{index}", **node)
    nodes.settle()
    workload = training(**changes)
    found = rows(api, workload, strict_place)
    placed, said, _ = scheduler_says(api, workload, strict_place)
    assert list(dict.fromkeys(f.what for f in found)) == ([what] if what else []), found
    assert placed == (what not in BY_SCHEDULER), (said, found)


def test_a_gpu_that_another_pod_holds_is_a_wait_and_no_refusal(
    api: KubeApi, strict_place: ClusterPlace, nodes: Nodes
) -> None:
    node = nodes.add("n0", resources=GPU)
    nodes.settle()
    holder = wanted(manifest(training(name="train-holder-1"), strict_place)).sets[0]
    root = f"/api/v1/namespaces/{strict_place.namespace}/pods"
    make(api, root, {"kind": "Pod", "metadata": {"name": "holder"}, "spec": {**holder.spec, "nodeName": node}})
    found = rows(api, training(), strict_place)
    assert [(f.what, f.verdict) for f in found] == [("free capacity", "WARN")], found
    assert f"{strict_place.namespace}/holder (1)" in found[0].found
    placed, said, _ = scheduler_says(api, training(), strict_place)
    assert not placed and "Insufficient nvidia.com/gpu" in said
    api.delete(f"{root}/holder", propagation="Background", grace=0)


@pytest.mark.parametrize(
    ("kind", "spec", "what"),
    [
        ("resourcequotas", {"hard": {"requests.nvidia.com/gpu": "0"}}, "quota"),
        ("resourcequotas", {"hard": {"limits.cpu": "8"}}, "quota"),
        ("resourcequotas", {"hard": {"requests.nvidia.com/gpu": "4", "pods": "10"}}, ""),
        ("limitranges", {"limits": [{"type": "Container", "max": {"memory": "512Mi"}}]}, "limit range"),
        ("limitranges", {"limits": [{"type": "Container", "default": {"cpu": "500m"}}]}, "limit range"),
        ("limitranges", {"limits": [{"type": "Container", "min": {"memory": "2Gi"}}]}, "limit range"),
        ("limitranges", {"limits": [{"type": "Container", "default": {"cpu": "2"}}]}, ""),
    ],
)
def test_the_preflight_and_admission_agree(
    kind: str, spec: Json, what: str, api: KubeApi, strict_place: ClusterPlace, nodes: Nodes
) -> None:
    nodes.add("n0", resources=GPU)
    nodes.settle()
    name = {"resourcequotas": "ResourceQuota", "limitranges": "LimitRange"}[kind]
    path = f"/api/v1/namespaces/{strict_place.namespace}/{kind}"
    make(api, path, {"kind": name, "metadata": {"name": "bounds"}, "spec": spec})
    until = time.monotonic() + 20
    while kind == "resourcequotas" and not (api.get(f"{path}/bounds").get("status") or {}).get("hard"):
        assert time.monotonic() < until
        time.sleep(0.1)
    found = rows(api, training(), strict_place)
    placed, said, _ = scheduler_says(api, training(), strict_place)
    assert [f.what for f in found] == ([what] if what else []), found
    assert placed == (what == ""), (said, found)


def test_pod_security_agrees(api: KubeApi, strict_place: ClusterPlace, nodes: Nodes) -> None:
    nodes.add("n0", resources=GPU)
    nodes.settle()
    made = manifest(training(), strict_place)
    container = made["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    del container["securityContext"]["allowPrivilegeEscalation"]
    found = [f for f in preflight(take(api, strict_place), [made], strict_place) if f.what == "pod security"]
    assert [f.verdict for f in found] == ["FAIL"]
    spec = made["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    with pytest.raises(GiveUp, match="violates PodSecurity"):
        make(
            api,
            f"/api/v1/namespaces/{strict_place.namespace}/pods",
            {"kind": "Pod", "metadata": {"name": "p"}, "spec": spec},
        )
