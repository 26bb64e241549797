"""Pure: whether a Karpenter NodePool could make a node for a pod, and what is in the way if not.

Instance types are the provider's and not in the API, so a pool is taken to be able unless something says otherwise.
Not covered: EC2NodeClass, prices, instance sizes, other autoscalers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from deployments.kube_quantity import milli, shown
from deployments.node_fit import Obstacle, affinity_terms, matches, taint_obstacle, tolerates
from deployments.preflight_findings import is_device

Json = Mapping[str, Any]
MAKES = ("nvidia.com/gpu", "amd.com/gpu", "aws.amazon.com/neuron", "habana.ai/gaudi")  # what Karpenter reckons with
_WELL_KNOWN = (
    "kubernetes.io/",
    "node.kubernetes.io/",
    "topology.kubernetes.io/",
    "karpenter.k8s.aws/",
    "karpenter.azure.com/",
)
_TYPE_KEYS = (
    "karpenter.k8s.aws/instance-category",
    "karpenter.k8s.aws/instance-family",
    "node.kubernetes.io/instance-type",
)
CAPACITY = "karpenter.sh/capacity-type"


def obstacles(spec: Json, requests: Mapping[str, int], count: int, pool: Json) -> list[Obstacle]:
    """What keeps `count` such pods from nodes of this pool; [] if it can make them."""
    return [
        *_ready(pool),
        *_taints(spec, pool),
        *_labels(spec, pool),
        *_devices(requests, pool),
        *_limits(requests, count, pool),
    ]


def makes_devices(pool: Json) -> bool:
    """Whether nodes of this pool may have GPUs, by their instance types."""
    for requirement in _requirements(pool):
        key, operator, values = requirement["key"], requirement.get("operator"), requirement.get("values") or []
        if key in _TYPE_KEYS and operator == "In":
            return any(
                re.match(r"(?:Standard_N|gr?\d|p\d|[gp]$|gr$|trn|inf|dl|a\d-high|a2-|a3-|g2-)", v) for v in values
            )
        if "gpu" in key and operator == "DoesNotExist":
            return False
    limits = (pool.get("spec") or {}).get("limits") or {}
    return not any(is_device(name) and milli(value) == 0 for name, value in limits.items())


def grace_seconds(pool: Json) -> float | None:
    """How long a node of the pool waits for its pods at most; None: for ever."""
    text = str(_template(pool).get("terminationGracePeriod") or "")
    parts = re.findall(r"(\d+(?:\.\d+)?)(h|m|s)", text)
    return sum(float(n) * {"h": 3600, "m": 60, "s": 1}[unit] for n, unit in parts) if parts else None


def _template(pool: Json) -> Json:
    return ((pool.get("spec") or {}).get("template") or {}).get("spec") or {}


def _requirements(pool: Json) -> list[Json]:
    return list(_template(pool).get("requirements") or [])


def _name(pool: Json) -> str:
    return f"NodePool {pool['metadata']['name']}"


def _ready(pool: Json) -> Iterator[Obstacle]:
    for condition in (pool.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "Ready" and condition.get("status") == "False":
            why = condition.get("message") or condition.get("reason") or "no reason given"
            yield Obstacle(
                kind="not ready",
                detail=f"{_name(pool)} is not ready: {why}",
                fix=f"kubectl describe nodepool {pool['metadata']['name']} (most often its node class is missing)",
            )


def _taints(spec: Json, pool: Json) -> Iterator[Obstacle]:
    for taint in _template(pool).get("taints") or ():
        if taint.get("effect") in ("NoSchedule", "NoExecute") and not tolerates(spec.get("tolerations") or (), taint):
            yield taint_obstacle(taint, _name(pool))


def _labels(spec: Json, pool: Json) -> Iterator[Obstacle]:
    for key, value in sorted((spec.get("nodeSelector") or {}).items()):
        if not _can_have(pool, key, [value]):
            yield Obstacle(
                kind="selector",
                detail=f"the pod wants nodes with {key}={value}, and {_name(pool)} does not make such",
                fix="correct the selector in cluster.toml, or add the label to the pool's template or requirements",
            )
    terms = affinity_terms(spec)
    if terms and not any(all(_holds(pool, e) for e in t.get("matchExpressions") or ()) for t in terms):
        yield Obstacle(
            kind="affinity",
            detail=f"{_name(pool)} makes no node that satisfies the pod's required node affinity",
            fix="correct the affinity, or the pool's requirements",
        )


def _holds(pool: Json, expression: Json) -> bool:
    operator = expression.get("operator")
    if operator == "In":
        return _can_have(pool, expression["key"], expression.get("values") or [])
    return operator != "Exists" or _can_have(pool, expression["key"], None)


def _can_have(pool: Json, key: str, values: list[str] | None) -> bool:
    """Whether a node of the pool can carry the label with one of the values (None: any)."""
    labels = ((pool["spec"].get("template") or {}).get("metadata") or {}).get("labels") or {}
    if key == "karpenter.sh/nodepool":
        return values is None or pool["metadata"]["name"] in values
    if key in labels:
        return values is None or labels[key] in values
    mine = [r for r in _requirements(pool) if r["key"] == key]
    if mine:
        return values is None or any(all(matches(r, {key: v}) for r in mine) for v in values)
    if key == CAPACITY:
        return values is None or "on-demand" in values
    return key.startswith(_WELL_KNOWN)


def _devices(requests: Mapping[str, int], pool: Json) -> Iterator[Obstacle]:
    for resource in (r for r, v in requests.items() if is_device(r) and v > 0):
        if resource not in MAKES:
            yield Obstacle(
                kind="resource",
                detail=f"{_name(pool)} cannot make nodes for {resource}: Karpenter reckons with {MAKES[0]} only, "
                "not with "
                "MIG slices or renamed shares",
                fix=f'keep such nodes as a fixed node group, or ask for gpu_resource = "{MAKES[0]}"',
                weight=4,
            )
        elif not makes_devices(pool):
            yield Obstacle(
                kind="resource",
                detail=f"{_name(pool)} makes no nodes with {resource}",
                fix="add a NodePool with GPU instance types",
                weight=4,
            )


def _limits(requests: Mapping[str, int], count: int, pool: Json) -> Iterator[Obstacle]:
    limits = (pool.get("spec") or {}).get("limits") or {}
    used = (pool.get("status") or {}).get("resources") or {}
    for resource, limit in sorted(limits.items()):
        wanted = requests.get(resource, 0) * count
        if not wanted:
            continue
        total, taken = milli(limit), milli(used.get(resource, "0"))
        if wanted > total - taken:
            never = wanted > total
            yield Obstacle(
                kind="limit",
                detail=f"{_name(pool)} may have {shown(resource, total)} {resource} in all, "
                f"{shown(resource, taken)} are "
                f"in use and {shown(resource, wanted)} are asked for",
                fix=f"raise spec.limits of the pool ({resource}), or "
                + ("ask for less" if never else "wait until others have ended"),
                weight=2,
                waits=not never,
            )
