"""Pure: the pod that runs a workload, the same for a step and for each member of a training, and parts of any pod.

The request travels inside the pod's object (an annotation that the pod sees as a file); one that is too long for that
is a file on the state volume. State is one ReadWriteMany claim, mounted at the same path in every pod. Every container
keeps to the Pod Security Standard `restricted`.
Not covered: the objects that make pods of it (manifests.py), the pods of a served model (serving_manifests.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from deployments.cluster_place import ClusterPlace
from deployments.labels import REQUEST_ANNOTATION, labels_of
from deployments.workload import Resources, Workload

Manifest = dict[str, Any]
REQUEST_FOLDER = "/reprise-job"
REQUEST_LIMIT = 200_000  # bytes; all annotations of an object may have 262144
CONTAINERS = {"train": "pytorch", "step": "step"}  # the operator reads exit codes of `pytorch` only


def pod_template(workload: Workload, place: ClusterPlace, choice: Manifest) -> Manifest:
    """Metadata and spec of the workload's pods. `choice`: nodeSelector and tolerations, left out where empty."""
    inside, deploys = request_is_inside(workload), workload.account == "deploy"
    volumes: list[Manifest] = [
        {"name": "state", "persistentVolumeClaim": {"claimName": place.state_claim}},
        {"name": "tmp", "emptyDir": {}},
    ]
    mounts: list[Manifest] = [{"name": "state", "mountPath": place.state_mount}, {"name": "tmp", "mountPath": "/tmp"}]
    if inside:
        item = {"path": "request.json", "fieldRef": {"fieldPath": f"metadata.annotations['{REQUEST_ANNOTATION}']"}}
        volumes.append({"name": "request", "downwardAPI": {"items": [item]}})
        mounts.append({"name": "request", "mountPath": REQUEST_FOLDER, "readOnly": True})
    if workload.resources.shm:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": workload.resources.shm}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    container: Manifest = {
        "name": CONTAINERS.get(workload.image, workload.image),
        "image": place.image(workload.image),
        "imagePullPolicy": place.image_pull_policy,
        "command": _argv(workload, place, f"{REQUEST_FOLDER if inside else job_folder(workload.name, place)}"),
        "env": environment(_environment(workload, place)),
        "resources": resources(workload.resources),
        "volumeMounts": mounts,
        "securityContext": container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if place.env_secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in place.env_secrets]
    spec: Manifest = {
        **{name: value for name, value in choice.items() if value},
        "serviceAccountName": place.deploy_account if deploys else place.service_account,
        "automountServiceAccountToken": deploys,
        "enableServiceLinks": False,  # a namespace with many services would fill the environment
        "terminationGracePeriodSeconds": max(1, math.ceil(workload.grace_seconds)),
        "securityContext": pod_security(place),
        "containers": [container],
        "volumes": volumes,
    }
    if place.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in place.image_pull_secrets]
    if place.priority_class:
        spec["priorityClassName"] = place.priority_class
    metadata: Manifest = {"labels": labels_of(workload)}
    if inside:
        metadata["annotations"] = {REQUEST_ANNOTATION: _request_text(workload)}
    return {"metadata": metadata, "spec": spec}


def request_is_inside(workload: Workload) -> bool:
    """Whether the request fits into the object itself."""
    return len(_request_text(workload).encode()) <= REQUEST_LIMIT


def job_folder(name: str, place: ClusterPlace) -> str:
    """The workload's folder on the state volume, as pods see it."""
    return f"{place.state_mount}/jobs/{name}"


def container_security() -> Manifest:
    """What `restricted` asks of each container."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def pod_security(place: ClusterPlace) -> Manifest:
    """What `restricted` asks of a pod, and a group that may write the state volume."""
    return {
        "runAsNonRoot": True,
        "runAsUser": place.user,
        "runAsGroup": place.user,
        "fsGroup": place.user,
        "fsGroupChangePolicy": "OnRootMismatch",  # not the whole volume at every start
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def environment(values: Mapping[str, str]) -> list[Manifest]:
    """Names and values as a container takes them, sorted."""
    return [{"name": name, "value": value} for name, value in sorted(values.items())]


def _argv(workload: Workload, place: ClusterPlace, request_folder: str) -> list[str]:
    folder = job_folder(workload.name, place)
    words = {"{request}": f"{request_folder}/request.json", "{result}": f"{folder}/result.json", "{job}": folder}
    argv = list(workload.command)
    for word, path in words.items():
        argv = [part.replace(word, path) for part in argv]
    if "training.launch" in argv and "--grace" not in argv:
        # The wrapper has to be done before the kubelet is.
        argv += ["--grace", f"{max(1.0, workload.grace_seconds - min(5.0, workload.grace_seconds / 4)):g}"]
    return argv


def _environment(workload: Workload, place: ClusterPlace) -> dict[str, str]:
    env = {"HOME": "/tmp", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "REPRISE_JOB": workload.name}
    env["USER"] = "reprise"  # the number has no name in any image, and DVC and torch ask for one
    if workload.image == "step":
        env["REPRISE_TERMINATION_LOG"] = "/dev/termination-log"
    if workload.image == "train" and workload.resources.gpus and workload.replicas * workload.processes > 1:
        env["NCCL_DEBUG"] = "WARN"
        if place.nccl_interface:
            env["NCCL_SOCKET_IFNAME"] = place.nccl_interface
    return env | dict(place.env) | dict(workload.env)


def resources(wanted: Resources) -> Manifest:
    """Requests and limits. No CPU limit: it would throttle a process while the node is idle."""
    limits: Manifest = {"memory": wanted.memory}
    if wanted.gpus:
        limits[wanted.gpu_resource] = str(wanted.gpus)
    return {"requests": {"cpu": f"{wanted.cpus:g}", **limits}, "limits": limits}


def _request_text(workload: Workload) -> str:
    return json.dumps(dict(workload.request), sort_keys=True)
