"""The sound cluster of the preflight's tests, and the workloads that suit it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments.cluster_place import ClusterPlace
from deployments.snapshot import Snapshot
from deployments.workload import Resources, Workload

SOUND = Path(__file__).parent / "snapshots" / "sound.json"
DIGEST = "sha256:" + "a" * 64
PLACE: dict[str, Any] = {
    "images": {kind: f"registry.example/reprise-{kind}@{DIGEST}" for kind in ("flow", "step", "train", "serve")},
    "env": {"MLFLOW_TRACKING_URI": "http://mlflow:5000"},
    "env_secrets": ("store-credentials",),
    "image_pull_secrets": ("registry",),
    "priority_class": "reprise-training",
    "queue": "training",
    "gpu_selector": {"accelerator": "nvidia-a100"},
}


def place(**changes: Any) -> ClusterPlace:
    return ClusterPlace(**{**PLACE, **changes})


def training(**changes: Any) -> Workload:
    """Three nodes with two GPUs each: a master on on-demand, two workers on spot."""
    resources = Resources(**{"cpus": 8, "memory": "32Gi", "gpus": 2, "shm": "8Gi", **changes.pop("resources", {})})
    given: dict[str, Any] = {
        "name": "train-0123456789ab-1",
        "image": "train",
        "command": ("python", "-m", "training.launch", "--spec", "{request}", "--processes", "2"),
        "replicas": 3,
        "processes": 2,
        "spot": True,
        "grace_seconds": 90.0,
        "labels": {"step": "train_model"},
    }
    return Workload(**{**given, **changes, "resources": resources})


def step(**changes: Any) -> Workload:
    given: dict[str, Any] = {
        "name": "pull-data-0123456789ab-1",
        "image": "step",
        "command": ("python", "-m", "tasks.step", "pull_data", "{request}", "{result}"),
        "labels": {"step": "pull_data"},
    }
    return Workload(**{**given, **changes})


def sound() -> dict[str, Any]:
    return copy.deepcopy(json.loads(SOUND.read_text()))


def broken(change: Callable[[dict[str, Any]], object]) -> Snapshot:
    """The sound snapshot after one change."""
    document = sound()
    change(document)
    return Snapshot.from_json(json.dumps(document))


def named(document: dict[str, Any], plural: str, name: str) -> dict[str, Any]:
    return next(o for o in document["objects"][plural] if o["metadata"]["name"] == name)
