"""The preflight against a real API server and a real scheduler: what it foretells is what then happens.

    KUBECONFIG=... pytest -m cluster tests/test_preflight_cluster.py

Nodes are made as API objects, with a heartbeat and without a kubelet, so that any capacity can be told; the pods have a
scheduling selector that only these nodes have. Nothing is run: pods are created, the scheduler's word is read, and they
are deleted. Not covered: kubelets (that a time-sliced node refuses a request above one is theirs to do).
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from deployments.cluster import Cluster
from deployments.dry_run import dry_run
from deployments.errors import GiveUp, PreflightError
from deployments.kube_api import MERGE_PATCH, ApiStatus, KubeApi
from deployments.kube_connect import connect
from deployments.manifests import WORKLOAD_LABEL, ClusterPlace, manifest
from deployments.preflight import preflight
from deployments.preflight_findings import Finding, wanted
from deployments.snapshot_take import take
from deployments.workload import Resources, Workload

pytestmark = pytest.mark.cluster
Json = dict[str, Any]
DIGEST = "@sha256:" + "a" * 64
ROUNDS = 15
MARK = f"preflight-{os.getpid()}"
# Several, so that the nodes that are there anyway are further off than ours, whatever ours lack.
OURS = {f"reprise.dev/test-{number}": MARK for number in range(4)}
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


@pytest.fixture(scope="module")
def api() -> Iterator[KubeApi]:
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("no KUBECONFIG: this needs a Kubernetes API")
    connection = connect()
    yield connection
    connection.close()


@pytest.fixture
def place(api: KubeApi) -> Iterator[ClusterPlace]:
    """A namespace that enforces `restricted`, with a claim and a service account."""
    name = f"preflight-{time.monotonic_ns() % 10**9}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    make(api, "/api/v1/namespaces", {"kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    make(
        api,
        f"/api/v1/namespaces/{name}/serviceaccounts",
        {"kind": "ServiceAccount", "metadata": {"name": "reprise-step"}},
    )
    claim(api, name, "ReadWriteMany")
    yield ClusterPlace(
        namespace=name,
        images={"step": "registry.example/step" + DIGEST, "train": "registry.example/train" + DIGEST},
        spot_selector={"karpenter.sh/capacity-type": "spot", **OURS},
        on_demand_selector={"karpenter.sh/capacity-type": "on-demand", **OURS},
    )
    api.delete(f"/api/v1/namespaces/{name}")


def claim(api: KubeApi, namespace: str, mode: str) -> None:
    spec = {"accessModes": [mode], "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": ""}
    spec["volumeName"] = f"{namespace}-volume"
    volume = {
        "kind": "PersistentVolume",
        "metadata": {"name": f"{namespace}-volume"},
        "spec": {
            "accessModes": [mode],
            "capacity": {"storage": "1Gi"},
            "hostPath": {"path": "/tmp"},
            "claimRef": {"namespace": namespace, "name": "reprise"},
            "storageClassName": "",
        },
    }
    make(api, "/api/v1/persistentvolumes", volume)
    item = {"kind": "PersistentVolumeClaim", "metadata": {"name": "reprise"}, "spec": spec}
    make(api, f"/api/v1/namespaces/{namespace}/persistentvolumeclaims", item)
    until = time.monotonic() + 30
    path = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/reprise"
    while api.get(path)["status"].get("phase") != "Bound":
        assert time.monotonic() < until
        time.sleep(0.1)


def make(api: KubeApi, collection: str, item: Json) -> Json:
    version = collection.split("/")[2] if collection.startswith("/api/") else "/".join(collection.split("/")[2:4])
    return api.request("POST", collection, body={"apiVersion": version, **item}, patience=20)


class Nodes:
    """Node objects that answer, and are gone at the end."""

    def __init__(self, api: KubeApi) -> None:
        self.api, self.names, self.silent = api, list[str](), set[str]()
        self.capacity: dict[str, dict[str, str]] = {}
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def add(self, name: str, *, capacity: str = "spot", taints: list[Json] | None = None, **more: Any) -> str:
        name = f"{MARK}-{name}"
        labels = {"karpenter.sh/capacity-type": capacity, **OURS, **more.pop("labels", {})}
        spec = {"taints": taints or [], "unschedulable": more.pop("cordoned", False)}
        make(self.api, "/api/v1/nodes", {"kind": "Node", "metadata": {"name": name, "labels": labels}, "spec": spec})
        self.capacity[name] = {"cpu": "8", "memory": "32Gi", "pods": "20", **more.pop("resources", {})}
        self.names.append(name)
        self._tell(name)
        return name

    def _tell(self, name: str) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        ready = {
            "type": "Ready",
            "status": "True",
            "reason": "Told",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }
        status = {"capacity": self.capacity[name], "allocatable": self.capacity[name], "conditions": [ready]}
        path = f"/api/v1/nodes/{name}/status"
        self.api.request("PATCH", path, body={"status": status}, content_type=MERGE_PATCH, patience=5)

    def _beat(self) -> None:
        while not self.closing.wait(8):
            for name in list(self.names):
                self._tell(name)

    def settle(self) -> None:
        """Until the controllers have taken the taint of a new node away."""
        until = time.monotonic() + 20
        for name in self.names:
            while any(
                "not-ready" in t["key"] for t in self.api.get(f"/api/v1/nodes/{name}")["spec"].get("taints") or ()
            ):
                assert time.monotonic() < until, name
                time.sleep(0.1)

    def close(self) -> None:
        self.closing.set()
        self.thread.join(20)
        for name in self.names:
            self.api.delete(f"/api/v1/nodes/{name}")


@pytest.fixture
def nodes(api: KubeApi) -> Iterator[Nodes]:
    made = Nodes(api)
    yield made
    made.close()


def training(**changes: Any) -> Workload:
    given: dict[str, Any] = {"cpus": 1, "memory": "1Gi", "gpus": 1, "shm": "64Mi", **changes.pop("resources", {})}
    return Workload(
        **{
            "name": "train-agree-1",
            "image": "train",
            "command": ("python", "-m", "training.launch", "--spec", "{request}"),
            "spot": True,
            "grace_seconds": 60.0,
            "resources": Resources(**given),
            **changes,
        }
    )


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


GPU_TAINT = {"key": "nvidia.com/gpu", "value": "true", "effect": "NoSchedule"}
GPU = {"nvidia.com/gpu": "1"}
MIG = {"nvidia.com/mig-1g.10gb": "2"}
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


@pytest.mark.parametrize("name", CASES)
def test_the_preflight_and_the_scheduler_agree(name: str, api: KubeApi, place: ClusterPlace, nodes: Nodes) -> None:
    told, changes, what = CASES[name]
    for index, node in enumerate(told):
        nodes.add(f"n{index}", **node)
    nodes.settle()
    workload = training(**changes)
    found = rows(api, workload, place)
    placed, said, _ = scheduler_says(api, workload, place)
    assert list(dict.fromkeys(f.what for f in found)) == ([what] if what else []), found
    assert placed == (what not in BY_SCHEDULER), (said, found)


def test_a_gpu_that_another_pod_holds_is_a_wait_and_no_refusal(api: KubeApi, place: ClusterPlace, nodes: Nodes) -> None:
    node = nodes.add("n0", resources=GPU)
    nodes.settle()
    holder = wanted(manifest(training(name="train-holder-1"), place)).sets[0]
    root = f"/api/v1/namespaces/{place.namespace}/pods"
    make(api, root, {"kind": "Pod", "metadata": {"name": "holder"}, "spec": {**holder.spec, "nodeName": node}})
    found = rows(api, training(), place)
    assert [(f.what, f.verdict) for f in found] == [("free capacity", "WARN")], found
    assert f"{place.namespace}/holder (1)" in found[0].found
    placed, said, _ = scheduler_says(api, training(), place)
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
    kind: str, spec: Json, what: str, api: KubeApi, place: ClusterPlace, nodes: Nodes
) -> None:
    nodes.add("n0", resources=GPU)
    nodes.settle()
    name = {"resourcequotas": "ResourceQuota", "limitranges": "LimitRange"}[kind]
    path = f"/api/v1/namespaces/{place.namespace}/{kind}"
    make(api, path, {"kind": name, "metadata": {"name": "bounds"}, "spec": spec})
    until = time.monotonic() + 20
    while kind == "resourcequotas" and not (api.get(f"{path}/bounds").get("status") or {}).get("hard"):
        assert time.monotonic() < until
        time.sleep(0.1)
    found = rows(api, training(), place)
    placed, said, _ = scheduler_says(api, training(), place)
    assert [f.what for f in found] == ([what] if what else []), found
    assert placed == (what == ""), (said, found)


def test_pod_security_agrees(api: KubeApi, place: ClusterPlace, nodes: Nodes) -> None:
    nodes.add("n0", resources=GPU)
    nodes.settle()
    made = manifest(training(), place)
    container = made["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    del container["securityContext"]["allowPrivilegeEscalation"]
    found = [f for f in preflight(take(api, place), [made], place) if f.what == "pod security"]
    assert [f.verdict for f in found] == ["FAIL"]
    spec = made["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    with pytest.raises(GiveUp, match="violates PodSecurity"):
        make(
            api, f"/api/v1/namespaces/{place.namespace}/pods", {"kind": "Pod", "metadata": {"name": "p"}, "spec": spec}
        )


class Marks:
    """Hears, by a watch, when the scheduler marks a pod: the moment and its words, by the workload of the pod."""

    def __init__(self, api: KubeApi, namespace: str) -> None:
        self.found: dict[str, tuple[float, str]] = {}
        self._heard, self._closed = threading.Condition(), False
        path = f"/api/v1/namespaces/{namespace}/pods"
        query = {"watch": "1", "resourceVersion": api.get(path)["metadata"]["resourceVersion"]}
        self._lines = api.stream(path, query, quiet_seconds=300)
        self._thread = threading.Thread(target=self._hear, daemon=True)
        self._thread.start()

    def _hear(self) -> None:
        for line in self._lines:
            pod = json.loads(line)["object"]
            assert pod["kind"] == "Pod", pod
            for condition in (pod.get("status") or {}).get("conditions") or ():
                if condition["type"] == "PodScheduled" and condition["status"] == "False":
                    with self._heard:
                        name = pod["metadata"]["labels"][WORKLOAD_LABEL]
                        self.found.setdefault(name, (time.monotonic(), condition.get("message", "")))
                        self._heard.notify_all()

    def wait(self, name: str) -> tuple[float, str]:
        with self._heard:
            assert self._heard.wait_for(lambda: name in self.found, 30), f"the scheduler said nothing of {name}"
            return self.found[name]

    def close(self) -> None:
        self._lines.close()
        self._thread.join(5)


def has_operator(api: KubeApi, place: ClusterPlace) -> bool:
    """Whether somebody makes pods of a PyTorchJob here."""
    probe, collection = training(name="train-probe-1"), f"/apis/kubeflow.org/v1/namespaces/{place.namespace}"
    try:
        api.request("POST", f"{collection}/pytorchjobs", body=manifest(probe, place))
    except PreflightError:
        return False
    until = time.monotonic() + 10
    while not (made := api.get(f"/api/v1/namespaces/{place.namespace}/pods")["items"]) and time.monotonic() < until:
        time.sleep(0.1)
    api.delete(f"{collection}/pytorchjobs/{probe.name}", propagation="Background")
    return bool(made)


@pytest.mark.parametrize("image", ["train", "step"])
def test_it_refuses_before_the_scheduler_could_speak(
    image: Any, api: KubeApi, place: ClusterPlace, nodes: Nodes, record_property: Any
) -> None:
    """From submission to the refusal, and from submission to the pod's mark: one after the other, so many times."""
    nodes.add("n0", resources=MIG)
    nodes.settle()
    if image == "train" and not has_operator(api, place):
        pytest.skip("nobody acts on PyTorchJobs here: this needs the Training Operator")
    place = replace(place, gpu_selector=OURS)
    cluster, marks = Cluster(place, api=api), Marks(api, place.namespace)
    ours, theirs, said = [], [], ""
    try:
        for number in range(ROUNDS + 1):
            work = training(name=f"agree-{image}-{number}", image=image, labels={"key": f"{number:012d}"})
            began = time.monotonic()
            with pytest.raises(PreflightError, match=r"no node has nvidia\.com/gpu") as refused:
                cluster.run(work)
            ours.append(time.monotonic() - began)
            assert refused.value.exit_code == 3
            path = cluster.object_path(image, work.name)
            assert api.find(path) is None
            began = time.monotonic()
            api.request("POST", cluster.object_path(image, ""), body=manifest(work, place))
            marked, said = marks.wait(work.name)
            theirs.append(marked - began)
            api.delete(path, propagation="Background")
    finally:
        marks.close()
        cluster.close()
    assert "Insufficient nvidia.com/gpu" in said
    first, mine, other = ours[0], statistics.median(ours[1:]), statistics.median(theirs[1:])
    kind = {"train": "PyTorchJob", "step": "Job"}[image]
    figures = {"refusal_ms": mine, "mark_ms": other, "first_refusal_ms": first, "slowest_refusal_ms": max(ours[1:])}
    told = {"kind": kind, "rounds": ROUNDS, "ratio": round(other / mine, 2)}
    told |= {name: round(1000 * value, 1) for name, value in figures.items()}
    record_property("refusal", told)
    print(json.dumps(told))
    assert mine < other


def test_a_dry_run_tells_what_the_server_takes_and_makes_nothing(api: KubeApi, place: ClusterPlace) -> None:
    good = manifest(training(image="step", name="dry-1"), place)
    unknown = manifest(training(image="step", name="dry-2"), place)
    unknown["spec"]["paralelism"] = 1
    elsewhere = {**good, "metadata": {**good["metadata"], "namespace": "no-such-namespace"}}
    undefined = {"apiVersion": "example.com/v1", "kind": "Nothing", "metadata": good["metadata"]}
    found = list(dry_run(api, [good, unknown, elsewhere, undefined]))
    assert [f.verdict for f in found] == ["OK", "FAIL", "FAIL", "FAIL"]
    assert 'unknown field "spec.paralelism"' in found[1].found
    assert "not found" in found[2].found and "make namespace no-such-namespace" in found[2].fix
    assert found[3].found == "Nothing of example.com/v1 is not defined on this cluster"
    assert api.get(f"/apis/batch/v1/namespaces/{place.namespace}/jobs")["items"] == []


def test_rights_are_what_the_server_says(api: KubeApi, place: ClusterPlace) -> None:
    snapshot = take(api, place)
    assert snapshot.access and all(a["allowed"] for a in snapshot.access)  # an administrator's kubeconfig
    assert not snapshot.unreadable
    assert snapshot.clock_offset is not None and abs(snapshot.clock_offset) < 2


def test_the_rights_of_a_limited_account_are_told_as_they_are(api: KubeApi, place: ClusterPlace) -> None:
    """A real service account with a Role that lacks one verb; `take` runs with its token."""
    here = f"/namespaces/{place.namespace}"
    make(api, f"/api/v1{here}/serviceaccounts", {"kind": "ServiceAccount", "metadata": {"name": "flow"}})
    rules = [
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list", "watch", "create", "patch", "delete"]},
        {
            "apiGroups": ["kubeflow.org"],
            "resources": ["pytorchjobs"],
            "verbs": ["get", "list", "watch", "patch", "delete"],
        },
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "delete"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["events"], "verbs": ["list"]},
    ]
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    make(api, f"{rbac}{here}/roles", {"kind": "Role", "metadata": {"name": "flow"}, "rules": rules})
    binding = {
        "kind": "RoleBinding",
        "metadata": {"name": "flow"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "flow"},
        "subjects": [{"kind": "ServiceAccount", "name": "flow", "namespace": place.namespace}],
    }
    make(api, f"{rbac}{here}/rolebindings", binding)
    request = {"kind": "TokenRequest", "spec": {"expirationSeconds": 600}}
    body = {"apiVersion": "authentication.k8s.io/v1", **request}
    token = api.request("POST", f"/api/v1{here}/serviceaccounts/flow/token", body=body)["status"]["token"]
    limited = connect()
    configuration = limited.client.configuration
    # The client renews its token by this hook; a fixed one takes its place.
    configuration.refresh_api_key_hook = None
    configuration.api_key = {"BearerToken": f"Bearer {token}", "authorization": f"Bearer {token}"}
    try:
        until = time.monotonic() + 20
        while True:  # the authorizer sees a new binding a moment later
            snapshot = take(limited, place)
            if any(a["allowed"] for a in snapshot.access):
                break
            assert time.monotonic() < until
            time.sleep(0.2)
    finally:
        limited.close()
    assert [(a["resource"], a["verb"]) for a in snapshot.access if not a["allowed"]] == [
        ("nodes", "get"),
        ("nodes", "list"),
        ("pytorchjobs", "create"),
    ]
    assert {"nodes", "pods"} <= set(snapshot.unreadable)
    found = [f for f in preflight(snapshot, [training()], place) if f.what == "rights"]
    assert [(f.verdict, "create pytorchjobs" in f.found) for f in found] == [("FAIL", True), ("WARN", False)]
    assert '"verbs": ["create"]' in found[0].fix
