"""What the tests of the cluster's Runner share: workloads, and controllers that play them on the scripted API.

Fixtures are in conftest.py. Not covered: workloads that run for real (tests/cluster_kit.py).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from deployments.cluster_place import ClusterPlace
from deployments.workload import Workload
from tests.deployments.kube_fake import KubeFake
from tests.deployments.kube_store import JOBS, NODES, Json

PLACE = ClusterPlace(namespace="ns", images={"step": "reprise-step", "train": "reprise-train"})
NAME = "pull-data-0123456789ab"
POD = f"{NAME}-abcde"
ATTEMPT = "train-0123456789ab-1"


def three_nodes(kube: KubeFake) -> None:
    """n1 and n2 are spot, cpu is not."""
    for name, capacity in {"n1": "spot", "n2": "spot", "cpu": "on-demand"}.items():
        labels = {"karpenter.sh/capacity-type": capacity}
        kube.put(NODES, {"metadata": {"name": name, "labels": labels}, "spec": {}})


def step(name: str = NAME, **more: Any) -> Workload:
    labels = {"run": "r1", "pipeline": "digits", "step": "pull_data", "key": "0123456789ab"}
    command = ("python", "-m", "tasks.step", "pull_data", "{request}", "{result}")
    return Workload(name=name, image="step", command=command, request={"n": 1}, labels=labels, **more)


def training(**more: Any) -> Workload:
    more = {"spot": True, "grace_seconds": 5.0, **more}
    command = ("python", "-m", "training.launch", "--spec", "{request}")
    return Workload(name=ATTEMPT, image="train", command=command, labels={"key": "0123456789ab"}, **more)


def created(kube: KubeFake) -> Json:
    """The step's Job, once it is there."""
    job: Json = kube.wait(lambda: kube.has(JOBS, NAME) and kube.get(JOBS, NAME))
    return job


def succeed(kube: KubeFake, item: Json, *, document: Json | None = None, state: Path | None = None) -> None:
    """Play the controllers for a step that runs well."""
    pod = kube.pod_for(item)["metadata"]["name"]
    if state is not None:
        folder = state / "jobs" / item["metadata"]["name"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(document))
        kube.end_pod(pod, 0)
    else:
        kube.end_pod(pod, 0, message=json.dumps(document) if document else "")
    kube.condition(JOBS, item["metadata"]["name"], "SuccessCriteriaMet")
    time.sleep(0.1)
    kube.condition(JOBS, item["metadata"]["name"], "Complete")
