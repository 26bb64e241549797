"""Pure: what came of a workload of which nothing runs any more, from the last states of its object, pods and nodes.

Not covered: one pod's end (pod_causes.py), waiting for it (cluster_run.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.job_status import JobEnd, end_of
from deployments.pod_causes import PodEnd, capacity_of, exit_of, first_cause, stamp
from deployments.pod_diagnosis import one_line
from deployments.workload import Cause, Workload

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What the place, or somebody by `stop`, ends a workload for. `error` is raised in place of an outcome."""

    cause: Cause
    reason: str  # "": its pods tell why
    error: Exception | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How it ended, and which pod decided that. Times are unix seconds."""

    cause: Cause
    reason: str
    exit_code: int | None
    pod: str
    node: str
    capacity: str
    notice: float | None
    started: float
    ended: float


def judge(
    workload: Workload,
    item: Json,
    pods: Sequence[tuple[Json, bool]],
    *,
    container: str,
    nodes: Mapping[str, Json],
    events: Sequence[Json] = (),
    ending: tuple[Cause, str] | None = None,
) -> Verdict:
    """`pods`: each with whether it is gone. `ending`: what the place itself ended it for, and why."""
    end = end_of(item)
    first = first_cause(pods, container=container, nodes=nodes, events=events, now=time.time())
    if end is not None and end.succeeded and ending is None:
        first = None
    cause, reason = ending or _cause(workload, end, first, len(pods), _capacity(workload, pods, nodes))
    seen = [pod for pod, _ in pods]
    main = next((p for p in seen if first and p["metadata"]["name"] == first.pod), seen[-1] if seen else None)
    starts = [t for p in seen if (t := stamp((p.get("status") or {}).get("startTime")))]
    ends = [t for p in seen if (t := stamp(exit_of(p, container).get("finishedAt")))]
    created = stamp(item["metadata"].get("creationTimestamp")) or time.time()
    return Verdict(
        cause=cause,
        reason=reason,
        exit_code=first.exit_code if first else (0 if cause == "complete" else None),
        pod=main["metadata"]["name"] if main else "",
        node=((main or {}).get("spec") or {}).get("nodeName") or "",
        capacity=_capacity(workload, [(main, False)] if first and main else pods, nodes),
        notice=first.notice if first else None,
        started=min(starts) if starts else created,
        ended=max(ends) if ends else time.time(),
    )


def _cause(workload: Workload, end: JobEnd | None, first: PodEnd | None, pods: int, capacity: str) -> tuple[Cause, str]:
    if end is not None and end.succeeded:
        return "complete", "exit 0"
    if end is not None and end.reason == "DeadlineExceeded":
        return "deadline", f"longer than its {workload.deadline_seconds or 0:g} s"
    training = workload.image == "train"
    unseen = training and pods < workload.replicas
    if first is not None and not (unseen and first.cause == "node_lost" and not first.disrupted):
        return first.cause, first.reason
    # A pod is gone with what it could have told; a bug would have left one that failed.
    why = one_line(end.message) if end is not None else "its pods vanished"
    return "spot" if training and capacity == "spot" else "node_lost", f"its pods went while nobody watched: {why}"


def _capacity(workload: Workload, pods: Sequence[tuple[Json, bool]], nodes: Mapping[str, Json]) -> str:
    """Of a training with workers theirs counts, since the master is on on-demand by design."""
    seen = [pod for pod, _ in pods]
    for pod in [p for p in seen if "-worker-" in p["metadata"]["name"]] or seen:
        if found := capacity_of(pod, nodes.get((pod.get("spec") or {}).get("nodeName") or "", {})):
            return found
    return "spot" if workload.spot else "on-demand"
