"""A refusal by the preflight comes before the scheduler could mark the pod: both timed on a real cluster.

    KUBECONFIG=... pytest -m cluster -s tests/test_preflight_cluster_speed.py

For trainings it needs somebody who makes pods of a PyTorchJob (the Training Operator), else that part skips.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from deployments.cluster import Cluster
from deployments.cluster_place import ClusterPlace
from deployments.errors import PreflightError
from deployments.kube_api import KubeApi
from deployments.labels import WORKLOAD_LABEL
from deployments.manifests import manifest
from tests.preflight_cluster_kit import MIG, OURS, Nodes, training

pytestmark = pytest.mark.cluster
ROUNDS = 15


class Marks:
    """Hears, by a watch, when the scheduler marks a pod: the moment and its words, by the workload of the pod."""

    def __init__(self, api: KubeApi, namespace: str) -> None:
        self.found: dict[str, tuple[float, str]] = {}
        self._heard = threading.Condition()
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
    image: Any, api: KubeApi, strict_place: ClusterPlace, nodes: Nodes, record_property: Any
) -> None:
    """From submission to the refusal, and from submission to the pod's mark: one after the other, so many times."""
    nodes.add("n0", resources=MIG)
    nodes.settle()
    if image == "train" and not has_operator(api, strict_place):
        pytest.skip("nobody acts on PyTorchJobs here: this needs the Training Operator")
    strict_place = replace(strict_place, gpu_selector=OURS)
    cluster, marks = Cluster(strict_place, api=api), Marks(api, strict_place.namespace)
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
            api.request("POST", cluster.object_path(image, ""), body=manifest(work, strict_place))
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
