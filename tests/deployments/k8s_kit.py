"""The overlays, built and raw, and what the tests of their objects ask of them again and again."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deployments.kustomize_tree import (
    load,
)

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "deployments" / "k8s"
OVERLAYS = ("kind", "spot", "on-demand")
SCHEMAS = Path(__file__).parent / "schemas"
NAMESPACES = {"reprise", "reprise-services"}
TOKENS = {
    "prefect-worker",
    "reprise-flow",
    "reprise-deploy",
    "flow-watch",
}  # accounts whose pods speak to the API server
KUBECTL = shutil.which("kubectl")
needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed: overlays are not built here")
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job")


@cache
def build(overlay: str) -> tuple[Json, ...]:
    """What `kubectl kustomize` makes of an overlay."""
    assert KUBECTL
    done = subprocess.run([KUBECTL, "kustomize", str(K8S / "overlays" / overlay)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


@cache
def raw(overlay: str) -> tuple[Json, ...]:
    """The same without kubectl: before patches and replacements, which change none of what is asked here."""
    return tuple(part.body for part in load(K8S / "overlays" / overlay))


def of_kind(objects: tuple[Json, ...], *kinds: str) -> list[Json]:
    """The objects of these kinds."""
    return [item for item in objects if item["kind"] in kinds]


def pods(objects: tuple[Json, ...]) -> Iterator[tuple[str, Json]]:
    """Name and pod spec of every workload."""
    for item in of_kind(objects, *WORKLOADS):
        yield f"{item['kind']}/{item['metadata']['name']}", item["spec"]["template"]["spec"]


def containers(spec: Json) -> list[Json]:
    """All of a pod."""
    return [*spec.get("initContainers", []), *spec["containers"]]


def flow_pod() -> Json:
    """The pod spec of the work pool's template."""
    template = json.loads((K8S / "base" / "pool.json").read_text())
    spec = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def pool_variables() -> Json:
    """What the work pool's template is filled with."""
    variables = json.loads((K8S / "base" / "pool.json").read_text())["variables"]["properties"]
    assert isinstance(variables, dict)
    return variables


def kustomization_folders() -> list[Path]:
    """Every folder with a kustomization."""
    return sorted(path.parent for path in K8S.rglob("kustomization.yaml"))


def against_restricted(spec: Json) -> Iterator[str]:
    """What the Pod Security Standard `restricted` would refuse of a pod."""
    pod = spec.get("securityContext", {})
    if not pod.get("runAsNonRoot"):
        yield "runAsNonRoot"
    if pod.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile"
    if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        yield "host namespaces"
    allowed = {
        "configMap",
        "downwardAPI",
        "emptyDir",
        "persistentVolumeClaim",
        "projected",
        "secret",
        "ephemeral",
        "csi",
    }
    for volume in spec.get("volumes", []):
        if set(volume) - {"name"} - allowed:
            yield f"volume {volume['name']}"
    for container in containers(spec):
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']}: allowPrivilegeEscalation"
        if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
            yield f"{container['name']}: capabilities"
        if own.get("privileged") or own.get("runAsUser") == 0:
            yield f"{container['name']}: privileged or root"


def all_pods() -> list[tuple[str, Json]]:
    """Pods of all overlays, the flow's, the GPU examples', and the operator's init container inside a worker."""
    found = {name: spec for overlay in OVERLAYS for name, spec in pods(raw(overlay))}
    for body in yaml.safe_load_all((K8S / "components" / "gpu-sharing" / "examples" / "pods.yaml").read_text()):
        found[f"Pod/{body['metadata']['name']}"] = body["spec"]
    return [*found.items(), ("the flow", flow_pod())]
