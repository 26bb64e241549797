"""What the tests of the preflight on a real API server share: a namespace, nodes that are only told, a training.

Nodes are made as API objects, with a heartbeat and without a kubelet, so that any capacity can be told; the pods have a
scheduling selector that only these nodes have. Nothing runs on them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from deployments.cluster_place import ClusterPlace
from deployments.kube_api import MERGE_PATCH, KubeApi
from deployments.workload import Resources, Workload

Json = dict[str, Any]
DIGEST = "@sha256:" + "a" * 64
MARK = f"preflight-{os.getpid()}"
# Several, so that the nodes that are there anyway are further off than ours, whatever ours lack.
OURS = {f"reprise.dev/test-{number}": MARK for number in range(4)}
GPU = {"nvidia.com/gpu": "1"}
MIG = {"nvidia.com/mig-1g.10gb": "2"}


@contextmanager
def make_strict_place(api: KubeApi) -> Iterator[ClusterPlace]:
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
        self.api, self.names = api, list[str]()
        self.capacity: dict[str, dict[str, str]] = {}
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Nodes:
        self.thread.start()
        return self

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

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.thread.join(20)
        for name in self.names:
            self.api.delete(f"/api/v1/nodes/{name}")


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
