"""Pure: how the pods of a workload ended, read as one of the causes.

A disruption that the platform wrote into a pod (condition DisruptionTarget), a node that is gone, and the exit code
143 or 137 are interruptions; 1..127 is a bug; OOMKilled is too little memory. With several pods the first end is the
cause: those that follow it exit because a peer is gone. Spot needs a sign: the node was announced to be taken, or pods
of a spot node were evicted. A node that vanished without one is node_lost, whatever it cost.
Not covered: what the place does itself (deadline, cancelled, no_capacity; cluster.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from deployments.pod_diagnosis import ended, last_line, one_line
from deployments.workload import Cause

Json = Mapping[str, Any]
CAPACITY_LABELS = (  # label, its value for spot
    ("karpenter.sh/capacity-type", "spot"),
    ("eks.amazonaws.com/capacityType", "spot"),
    ("cloud.google.com/gke-spot", "true"),
    ("cloud.google.com/gke-preemptible", "true"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
)
DISRUPTED_TAINTS = ("karpenter.sh/disrupted", "karpenter.sh/disruption")
UNREACHABLE = "node.kubernetes.io/unreachable"
_TAKEN = re.compile(r"spot|interrupt|preempt|rebalance|scheduledchange|stopping|terminating instance", re.I)
_MOVED = re.compile(r"underutilized|consolidat|\bempty\b|drift|expir", re.I)


@dataclass(frozen=True, kw_only=True)
class PodEnd:
    """How a pod ended."""

    pod: str
    node: str
    at: float  # unix seconds: when its end began, the notice or the exit
    exit_code: int | None
    notice: float | None
    cause: Cause
    reason: str
    disrupted: bool  # by the platform, in its own words


def first_cause(
    pods: Iterable[tuple[Json, bool]],
    *,
    container: str,
    nodes: Mapping[str, Json],
    events: Sequence[Json] = (),
    now: float,
) -> PodEnd | None:
    """The end that was the cause of all others; None if no pod has ended.

    `pods`: each with whether its object is gone. `nodes`: by name, as last seen, with {"gone": True} if it is away.
    """
    found = [e for e in (pod_end(p, g, container, nodes, events, now) for p, g in pods) if e and e.cause != "complete"]
    if not found:
        return None
    # A bug is the cause unless the platform had begun to take another pod before: then it is a peer's complaint.
    for end in sorted(found, key=lambda e: (e.at, not e.disrupted)):
        if end.cause in ("user_error", "out_of_memory") or end.disrupted:
            return end
    return min(found, key=lambda e: e.at)


def pod_end(
    pod: Json, gone: bool, container: str, nodes: Mapping[str, Json], events: Sequence[Json], now: float
) -> PodEnd | None:
    """How this pod ended, or began to end; None while it is well."""
    status, metadata = pod.get("status") or {}, pod["metadata"]
    node_name = (pod.get("spec") or {}).get("nodeName") or ""
    terminated = exit_of(pod, container)
    code = terminated.get("exitCode") if terminated else None
    disruption = condition(status, "DisruptionTarget")
    deleting = metadata.get("deletionTimestamp")
    if not (gone or deleting or disruption or status.get("phase") in ("Failed", "Succeeded")):
        return None
    finished = stamp(terminated.get("finishedAt")) if terminated else None
    notice = stamp(disruption.get("lastTransitionTime")) if disruption else None
    if deleting:
        asked = (stamp(deleting) or now) - float(metadata.get("deletionGracePeriodSeconds") or 0)
        notice = asked if notice is None else min(notice, asked)
    cause, reason = _cause(pod, gone, code, terminated, disruption, node_name, nodes.get(node_name, {}), events)
    if cause == "node_lost" and code is None:
        notice = None  # nobody told it: the mark came when it was gone
    began = min([t for t in (finished, stamp(disruption.get("lastTransitionTime")), notice) if t] or [now])
    return PodEnd(
        pod=metadata["name"],
        node=node_name,
        at=began,
        exit_code=code,
        notice=notice if cause in ("spot", "consolidation", "node_lost") else None,
        cause=cause,
        reason=reason,
        disrupted=bool(disruption),
    )


def _cause(
    pod: Json,
    gone: bool,
    code: int | None,
    terminated: Json,
    disruption: Json,
    node_name: str,
    node: Json,
    events: Sequence[Json],
) -> tuple[Cause, str]:
    told = "it left no exit code" if code is None else f"exit {code}"
    name = pod["metadata"]["name"]
    if terminated.get("reason") == "OOMKilled":
        return "out_of_memory", ended(pod)
    if code == 0:
        return "complete", "exit 0"
    if code is not None and 0 < code < 128:
        said = last_line(terminated.get("message", ""))
        after = f" after {disruption.get('reason')}" if disruption else ""
        return "user_error", f"exit {code}{after}{f': {said}' if said else ''}"
    kind = disruption.get("reason", "")
    capacity = capacity_of(pod, node)
    where = f"{capacity + ' ' if capacity else ''}node {node_name or '(none)'}"
    if kind == "PreemptionByScheduler":
        return "consolidation", f"pod {name} made room for a pod of higher priority; {told}"
    if kind == "TerminationByKubelet":
        return _by_kubelet(pod, where, capacity, told)
    if kind == "EvictionByEvictionAPI":
        spoken = " ".join(one_line(e.get("message", "")) + " " + str(e.get("reason", "")) for e in events)
        if _TAKEN.search(spoken):
            return "spot", f"{where} was reclaimed, with notice; {told}"
        if _MOVED.search(spoken):
            return "consolidation", f"the pod was moved off {where} (consolidation); {told}"
        if capacity == "spot":
            sign = " and the node is marked as disrupted" if is_disrupted(node) else ""
            return "spot", f"the pod was evicted from {where}{sign}; {told}"
        return "consolidation", f"the pod was evicted from {where} (a drain, or consolidation); {told}"
    if kind in ("DeletionByTaintManager", "DeletionByPodGC") or node.get("gone"):
        if is_disrupted(node):
            return "spot", f"{where} was reclaimed before the pod had left it; {told}"
        return "node_lost", f"{where} vanished without a notice; {told}"
    if gone or pod["metadata"].get("deletionTimestamp"):
        if is_disrupted(node):
            return "spot", f"the pod was deleted from {where}, which is being taken away; {told}"
        return "node_lost", f"pod {name} was deleted; {told}"
    if code is None:
        return "node_lost", f"pod {name} on {where} ended and told nothing: {ended(pod) or 'no status'}"
    return "node_lost", f"exit {code}: a signal that nobody here sent, on {where}"


def _by_kubelet(pod: Json, where: str, capacity: str, told: str) -> tuple[Cause, str]:
    """The kubelet ended it: the node shuts down, or it ran short of something."""
    text = one_line((pod.get("status") or {}).get("message", ""))
    if "shutdown" in text.lower():
        if capacity == "spot":
            return "spot", f"{where} was shut down; {told}"
        return "node_lost", f"{where} was shut down; {told}"
    if "memory" in text.lower():
        return "out_of_memory", ended(pod) if "Evicted" in str(pod["status"].get("reason")) else f"{where}: {text}"
    return "node_lost", f"{where} ran short: {text}; {told}"


def exit_of(pod: Json, container: str) -> dict[str, Any]:
    """The `terminated` state of the container; {} while it runs or if nothing is known."""
    for status in (pod.get("status") or {}).get("containerStatuses") or ():
        if status.get("name") == container:
            found = (status.get("state") or {}).get("terminated")
            # What the API server invents for a pod that a dead node never reported on.
            if found and found.get("reason") != "ContainerStatusUnknown":
                return dict(found)
    return {}


def is_terminal(pod: Json) -> bool:
    """Whether nothing of the pod runs any more, in its own words."""
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def is_scheduled(pod: Json) -> bool:
    """Whether the pod has a node."""
    return bool((pod.get("spec") or {}).get("nodeName"))


def capacity_of(pod: Json, node: Json) -> str:
    """spot, on-demand, or "": what the node's labels say, else what the pod asked for."""
    for labels in ((node.get("metadata") or {}).get("labels") or {}, (pod.get("spec") or {}).get("nodeSelector") or {}):
        for label, spot in CAPACITY_LABELS:
            if label in labels:
                return "spot" if str(labels[label]).lower() == spot else "on-demand"
    return ""


def is_disrupted(node: Json) -> bool:
    """Whether Karpenter has marked the node as one to be taken away."""
    taints = (node.get("spec") or {}).get("taints") or ()
    return any(taint.get("key") in DISRUPTED_TAINTS for taint in taints)


def is_unreachable(node: Json) -> bool:
    """Whether the node does not answer the control plane, or is gone."""
    taints = (node.get("spec") or {}).get("taints") or ()
    return bool(node.get("gone")) or any(taint.get("key") == UNREACHABLE for taint in taints)


def condition(status: Json, kind: str) -> dict[str, Any]:
    """The condition of that type if it is True, else {}."""
    for found in status.get("conditions") or ():
        if found.get("type") == kind and found.get("status") == "True":
            return dict(found)
    return {}


def stamp(text: Any) -> float | None:
    """Unix seconds of a Kubernetes timestamp; None if there is none."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None
