"""Pure: one pipeline's model in service on a cluster -> a Deployment of TorchServe, its Service and its budget.

A pod holds exactly one version. Its init container copies the .mar from the state volume and believes only the digest;
a pod counts as ready when the model has answered a golden request rightly, not when a port is open. The rollout takes a
ready pod away only after a new one is ready, and a pod that leaves serves on while the endpoints forget it.
Not covered: applying and undoing (cluster_serving.py), the program inside the pod (serving_pod.py), the registry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from deployments.cluster_place import ClusterPlace
from deployments.labels import DOMAIN, MANAGED, label_value
from deployments.pod_template import Manifest, container_security, environment, pod_security, resources
from deployments.workload import Resources

INFERENCE, METRICS = 8080, 8082  # the management port stays on the pod's loopback
MODELS, STATE, SETTINGS = "/models", "/var/lib/torchserve", "/etc/torchserve"
SETTINGS_MAP = "torchserve"  # a ConfigMap of the namespace, where there is one: limits and log levels of every server
LABEL_ANNOTATION, VERSION_ANNOTATION, MAR_ANNOTATION = f"{DOMAIN}/label", f"{DOMAIN}/version", f"{DOMAIN}/mar"


@dataclass(frozen=True, kw_only=True)
class Serving:
    """One version of one pipeline's model. Paths are as pods see the state volume."""

    pipeline: str
    version: str  # the registry's
    label: str  # TorchServe's version label
    mar: str  # path of the archive
    sha256: str  # of the archive
    golden: str  # path of heldout.jsonl: requests and the model's own answers
    golden_count: int = 5
    replicas: int = 2
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0, memory="2Gi"))
    start_seconds: float = 300.0  # for a new pod: node, image, copy, loading, golden requests
    response_timeout: float = 30.0  # seconds that a request may take
    drain_seconds: float = 10.0  # until every proxy has forgotten a pod that leaves
    soak_seconds: float = 5.0  # a new pod has to stay ready that long

    @property
    def name(self) -> str:
        """Of Deployment, Service and budget."""
        return serving_name(self.pipeline)


def serving_name(pipeline: str) -> str:
    """The name under which a pipeline's model is served: of Deployment, Service and budget, a DNS label."""
    return f"serve-{label_value(pipeline).lower().replace('_', '-').replace('.', '-')}"[:63].rstrip("-")


def serving_deployment(serving: Serving, place: ClusterPlace) -> Manifest:
    """maxUnavailable 0, maxSurge 1: the old version serves until the new one has proved itself, pod by pod."""
    program = ["python", "-m", "deployments.serving_pod"]
    archive = serving.mar.rsplit("/", 1)[-1]
    image = {"image": place.image("serve"), "imagePullPolicy": place.image_pull_policy}
    security = {**container_security(), "readOnlyRootFilesystem": True}
    models, tmp = {"name": "models", "mountPath": MODELS}, {"name": "tmp", "mountPath": "/tmp"}
    fetch = {
        "name": "fetch",
        **image,
        "command": [
            *program,
            "fetch",
            *("--mar", serving.mar),
            *("--sha256", serving.sha256),
            *("--golden", serving.golden),
            *("--count", str(serving.golden_count)),
            *("--to", MODELS),
        ],
        "env": environment({"HOME": "/tmp"}),
        "resources": resources(Resources(cpus=0.1, memory="256Mi")),
        "securityContext": security,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "state", "mountPath": place.state_mount, "readOnly": True}, models, tmp],
    }
    about_model = ["--model", serving.pipeline, "--label", serving.label, "--golden", f"{MODELS}/golden.json"]
    ready = [*program, "ready", *about_model, "--state", STATE]
    probe: Manifest = {"exec": {"command": ready}, "timeoutSeconds": 10}
    serve: Manifest = {
        "name": "torchserve",
        **image,
        "command": [*program, "serve", *about_model, "--mar", f"{MODELS}/{archive}", "--state", STATE],
        "env": environment({"HOME": "/tmp", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **place.env}),
        "ports": [
            {"name": "http", "containerPort": INFERENCE},
            {"name": "metrics", "containerPort": METRICS},
        ],
        "resources": resources(serving.resources),
        "securityContext": security,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {**models, "readOnly": True},
            tmp,
            {"name": "torchserve", "mountPath": STATE},
            {"name": "settings", "mountPath": SETTINGS, "readOnly": True},
        ],
        "startupProbe": {**probe, "periodSeconds": 2, "failureThreshold": math.ceil(serving.start_seconds / 2)},
        "readinessProbe": {**probe, "periodSeconds": 5, "failureThreshold": 2},
        "livenessProbe": {
            "httpGet": {"path": "/ping", "port": "http"},
            "timeoutSeconds": 5,
            "periodSeconds": 10,
            "failureThreshold": 6,
        },
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", f"{serving.drain_seconds:g}"]}}},
    }
    labels = _labels(serving)
    spec: Manifest = {
        "serviceAccountName": place.serving_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": math.ceil(serving.drain_seconds + serving.response_timeout + 10),
        "securityContext": pod_security(place),
        "initContainers": [fetch],
        "containers": [serve],
        "volumes": [
            {"name": "state", "persistentVolumeClaim": {"claimName": place.state_claim}},
            {"name": "models", "emptyDir": {}},
            {"name": "torchserve", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "settings", "configMap": {"name": SETTINGS_MAP, "optional": True}},
        ],
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": _selector(serving)},
            }
        ],
    }
    if serving.resources.gpus:
        spec["nodeSelector"] = {
            **place.on_demand_selector,
            **place.gpu_selector,
        }  # spot takes a GPU away with its model
        spec["tolerations"] = [{"key": place.gpu_taint, "operator": "Exists", "effect": "NoSchedule"}]
    if place.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in place.image_pull_secrets]
    about = {VERSION_ANNOTATION: serving.version, LABEL_ANNOTATION: serving.label, MAR_ANNOTATION: serving.sha256}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": serving.name,
            "namespace": place.namespace,
            "labels": labels,
            "annotations": {**about, "kubernetes.io/change-cause": f"version {serving.version} ({serving.label})"},
        },
        "spec": {
            "replicas": serving.replicas,
            "selector": {"matchLabels": _selector(serving)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "minReadySeconds": math.ceil(serving.soak_seconds),
            "progressDeadlineSeconds": math.ceil(serving.start_seconds + serving.soak_seconds) + 30,
            "revisionHistoryLimit": 5,
            "template": {"metadata": {"labels": labels, "annotations": about}, "spec": spec},
        },
    }


def serving_service(serving: Serving, place: ClusterPlace) -> Manifest:
    """A ClusterIP on the pods' own port; metrics beside it. What makes it reachable from outside is the platform's."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": serving.name, "namespace": place.namespace, "labels": _labels(serving)},
        "spec": {
            "selector": _selector(serving),
            "ports": [
                {"name": "http", "port": INFERENCE, "targetPort": "http"},
                {"name": "metrics", "port": METRICS, "targetPort": "metrics"},
            ],
        },
    }


def serving_pdb(serving: Serving, place: ClusterPlace) -> Manifest:
    """Drains take one ready pod at a time, and broken ones at any time."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": serving.name, "namespace": place.namespace, "labels": _labels(serving)},
        "spec": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": _selector(serving)},
        },
    }


def serving_objects(serving: Serving, place: ClusterPlace) -> list[Manifest]:
    """All three, in the order in which they are applied: the Deployment last, so that its pods are found at once."""
    return [serving_service(serving, place), serving_pdb(serving, place), serving_deployment(serving, place)]


def _selector(serving: Serving) -> dict[str, str]:
    return {"app.kubernetes.io/component": "serve", f"{DOMAIN}/pipeline": label_value(serving.pipeline)}


def _labels(serving: Serving) -> dict[str, Any]:
    return {**MANAGED, **_selector(serving)}
