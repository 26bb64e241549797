"""Pure: what keeps a pod from a node, told as obstacles with a fix each: the scheduler's filters that matter here.

Covered: cordon, readiness, taints, nodeSelector, required node affinity, zones of the state volume, capacity, GPUs
that are shared by time slicing. Not covered: pod affinity, topology spread, host ports, DRA claims, preemption.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.kube_quantity import milli, shown
from deployments.preflight_findings import SPOT_LABELS, is_device

Json = Mapping[str, Any]
BY_ITSELF = (  # taints that come and go with a node's state
    "node.kubernetes.io/memory-pressure",
    "node.kubernetes.io/disk-pressure",
    "node.kubernetes.io/pid-pressure",
    "node.kubernetes.io/network-unavailable",
    "node.cloudprovider.kubernetes.io/uninitialized",
    "karpenter.sh/unregistered",
    "karpenter.sh/disrupted",
    "ToBeDeletedByClusterAutoscaler",
)
TOLD_OTHERWISE = ("node.kubernetes.io/unschedulable", "node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")

OTHER_CAPACITY = 3  # spot or on-demand is what somebody decided: the nodes of the other kind are no near miss


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """One thing that keeps a pod from one node."""

    kind: str  # cordoned | not ready | taint | selector | affinity | zone | resource | time slicing | limit
    detail: str
    fix: str
    weight: int = 1  # how far it is from fitting
    waits: bool = False  # it may pass without anybody's doing


def tolerates(tolerations: Iterable[Json], taint: Json) -> bool:
    """Whether any of the tolerations covers the taint."""
    for toleration in tolerations:
        if toleration.get("effect") and toleration["effect"] != taint.get("effect"):
            continue
        if not toleration.get("key"):
            if toleration.get("operator") == "Exists":
                return True
            continue
        if toleration["key"] != taint.get("key"):
            continue
        if toleration.get("operator") == "Exists" or (toleration.get("value") or "") == (taint.get("value") or ""):
            return True
    return False


def matches(expression: Json, labels: Mapping[str, str]) -> bool:
    """Whether labels satisfy one matchExpression of a node selector term."""
    key, operator, values = expression["key"], expression.get("operator"), expression.get("values") or []
    value = labels.get(key)
    if operator == "Exists":
        return value is not None
    if operator == "DoesNotExist":
        return value is None
    if operator == "NotIn":
        return value is None or value not in values
    if value is None:
        return False
    if operator in ("Gt", "Lt"):
        try:
            return int(value) > int(values[0]) if operator == "Gt" else int(value) < int(values[0])
        except (ValueError, IndexError):
            return False
    return value in values


def affinity_terms(spec: Json) -> list[Json]:
    """The required node affinity: terms of which one has to hold."""
    required = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    ) or {}
    return list(required.get("nodeSelectorTerms") or [])


def term_holds(term: Json, labels: Mapping[str, str], name: str) -> bool:
    """Whether a node selector term holds; an empty one never does."""
    expressions, fields = term.get("matchExpressions") or [], term.get("matchFields") or []
    if not expressions and not fields:
        return False
    return all(matches(e, labels) for e in expressions) and all(matches(f, {"metadata.name": name}) for f in fields)


def obstacles(spec: Json, requests: Mapping[str, int], node: Json, capacity: Mapping[str, int]) -> list[Obstacle]:
    """What keeps one pod from a node whose capacity (in thousandths) nobody else uses; [] if it fits."""
    found = [*_state(node), *_taints(spec, node), *_labels(spec, node)]
    found += list(_resources(requests, node, capacity))
    return found


def _state(node: Json) -> Iterator[Obstacle]:
    name, spec = node["metadata"]["name"], node.get("spec") or {}
    if spec.get("unschedulable"):
        yield Obstacle(kind="cordoned", detail=f"node {name} is cordoned", fix=f"kubectl uncordon {name}")
    ready = next((c for c in (node.get("status") or {}).get("conditions") or () if c.get("type") == "Ready"), None)
    if ready is not None and ready.get("status") != "True":
        yield Obstacle(
            kind="not ready",
            detail=f"node {name} is not ready ({ready.get('reason') or ready.get('status')})",
            fix=f"kubectl describe node {name}",
            waits=True,
        )


def _taints(spec: Json, node: Json) -> Iterator[Obstacle]:
    name, tolerations = node["metadata"]["name"], spec.get("tolerations") or ()
    for taint in (node.get("spec") or {}).get("taints") or ():
        if taint.get("effect") not in ("NoSchedule", "NoExecute") or tolerates(tolerations, taint):
            continue
        key = taint["key"]
        if key in TOLD_OTHERWISE:
            continue
        if key in BY_ITSELF:
            yield Obstacle(
                kind="not ready",
                detail=f"node {name} has taint {key}",
                fix=f"kubectl describe node {name}; the taint goes with its reason",
                waits=True,
            )
            continue
        yield taint_obstacle(taint, f"node {name}")


def taint_obstacle(taint: Json, where: str) -> Obstacle:
    """A taint that is not tolerated."""
    text = f"{taint['key']}{'=' + taint['value'] if taint.get('value') else ''}:{taint.get('effect')}"
    entry = f'{{ key = "{taint["key"]}", operator = "Exists", effect = "{taint.get("effect")}" }}'
    return Obstacle(
        kind="taint",
        detail=f"{where} has taint {text}, which the pod does not tolerate",
        fix=f"if the workload may run there, add to tolerations in cluster.toml: {entry}",
    )


def _labels(spec: Json, node: Json) -> Iterator[Obstacle]:
    name, labels = node["metadata"]["name"], node["metadata"].get("labels") or {}
    for key, value in sorted((spec.get("nodeSelector") or {}).items()):
        if labels.get(key) != value:
            has = f"{key}={labels[key]}" if key in labels else f"no label {key}"
            yield Obstacle(
                kind="selector",
                detail=f"the pod wants nodes with {key}={value}; node {name} has {has}",
                fix=f"correct the selector in cluster.toml, or label such nodes: kubectl label node NODE {key}={value}",
                weight=OTHER_CAPACITY if key in SPOT_LABELS else 1,
            )
    terms = affinity_terms(spec)
    if terms and not any(term_holds(t, labels, name) for t in terms):
        yield Obstacle(
            kind="affinity",
            detail=f"node {name} satisfies none of the pod's required node affinity",
            fix="correct the affinity, or label such nodes",
        )


def zone_obstacle(volume: Json, node: Json) -> Iterator[Obstacle]:
    """A volume that nodes of other zones cannot reach."""
    terms = (((volume.get("spec") or {}).get("nodeAffinity") or {}).get("required") or {}).get(
        "nodeSelectorTerms"
    ) or []
    labels, name = node["metadata"].get("labels") or {}, node["metadata"]["name"]
    if terms and not any(term_holds(t, labels, name) for t in terms):
        zone = labels.get("topology.kubernetes.io/zone", "another place")
        yield Obstacle(
            kind="zone",
            detail=f"the state volume {volume['metadata']['name']} cannot be reached from node {name} ({zone})",
            fix="use storage that all zones reach (a shared file system), or nodes in the volume's zone",
        )


def _resources(requests: Mapping[str, int], node: Json, capacity: Mapping[str, int]) -> Iterator[Obstacle]:
    name, labels = node["metadata"]["name"], node["metadata"].get("labels") or {}
    for resource, wanted in sorted(requests.items()):
        if resource == "pods" or wanted <= 0:
            continue
        there = capacity.get(resource, 0)
        asked = f"{shown(resource, wanted)} {resource}"
        if there < wanted:
            if there <= 0 and is_device(resource):
                yield Obstacle(
                    kind="resource", detail=f"{resource}|{name}", fix="", weight=3
                )  # told by `missing_device`
                continue
            yield Obstacle(
                kind="resource",
                detail=f"a pod asks for {asked}, and node {name} gives {shown(resource, there)} at most",
                fix=f"ask for less {resource} in [resources] of cluster.toml (more nodes with less each), or add "
                "larger nodes",
                weight=2,
            )
        elif is_device(resource) and wanted > 1000 and is_time_sliced(labels, resource):
            yield Obstacle(
                kind="time slicing",
                detail=f"a pod asks for {asked}, and node {name} shares each GPU by time slicing: it would get shares, "
                "perhaps of one and the same GPU, and with failRequestsGreaterThanOne it is refused on the node "
                "(UnexpectedAdmissionError)",
                fix="ask for one share a pod (gpus = 1), or for whole GPUs: gpu_selector = "
                '{ "nvidia.com/gpu.sharing-strategy" = "none" } in cluster.toml',
            )


def is_time_sliced(labels: Mapping[str, str], resource: str) -> bool:
    """Whether GPU feature discovery says that this node shares its GPUs."""
    if not resource.startswith("nvidia.com/gpu"):
        return False
    if labels.get("nvidia.com/gpu.sharing-strategy") in ("time-slicing", "mps"):
        return True
    replicas = labels.get("nvidia.com/gpu.replicas", "1")
    return replicas.isdigit() and int(replicas) > 1


def missing_device(resource: str, nodes: Iterable[Json]) -> Obstacle:
    """No node has the device that is asked for: what they have instead."""
    offered: dict[str, int] = {}
    for node in nodes:
        for name, value in (node["status"].get("allocatable") or {}).items():
            if is_device(name) and milli(value) > 0:
                offered[name] = max(offered.get(name, 0), milli(value) // 1000)
    if offered:
        names = ", ".join(f"{n} (up to {c} a node)" for n, c in sorted(offered.items()))
        nearest = min(offered, key=lambda n: (not _alike(n, resource), n))
        return Obstacle(
            kind="resource",
            detail=f"no node has {resource}; nodes offer {names}",
            fix=f'ask for what is there: gpu_resource = "{nearest}" in [resources.train_model] of cluster.toml, or '
            "change the device plugin's configuration (MIG strategy, renameByDefault)",
            weight=3,
        )
    return Obstacle(
        kind="resource",
        detail=f"no node has {resource}, nor any other device",
        fix="install the NVIDIA device plugin or the GPU Operator on GPU nodes, or add such nodes (kubectl get "
        "nodes -o "
        "custom-columns=NAME:.metadata.name,GPU:.status.allocatable.nvidia\\.com/gpu shows them)",
        weight=3,
    )


def _alike(one: str, other: str) -> bool:
    return one.partition("-")[0] == other.partition("-")[0]


def rooms(requests: Mapping[str, int], capacity: Mapping[str, int]) -> int:
    """How many such pods a capacity takes."""
    return max(0, min((capacity.get(r, 0) // v for r, v in requests.items() if v > 0), default=0))
