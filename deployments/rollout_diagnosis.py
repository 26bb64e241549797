"""Pure: why the new pods of a rollout do not get ready, and whether they still may.

    hopeless(pods) -> "the model answers wrongly: ..." or ""      # no repetition helps: give up now
    stuck(pods)    -> "image r/x:1 cannot be pulled ..." or ""    # somebody has to put it right: give up soon

Not covered: a pod by itself (pod_diagnosis.py), the rollout (cluster_serving.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deployments.errors import GateRefused
from deployments.pod_diagnosis import FATAL, HOPELESS, containers, ended, last_line, not_created, waiting

VERDICT = GateRefused.exit_code  # of serving_pod: this archive will never be served, whatever is tried again
CRASHES = 2  # starts anew of a new pod's container: more of them is a loop, not bad luck
Json = Mapping[str, Any]


def hopeless(pods: Iterable[Json]) -> str:
    """Why a new pod will not come right by itself; "" while it may."""
    for pod in pods:
        held = waiting(pod)
        if held is not None and held.reason in HOPELESS:
            return held.sentence
        for container in containers(pod):
            if container.get("ready"):
                continue
            if _last_end(container).get("exitCode") == VERDICT or int(container.get("restartCount", 0)) >= CRASHES:
                return last_words(container)
    return ""


def stuck(pods: Iterable[Json]) -> str:
    """What somebody has to put right before a new pod can start; "" if nothing is known."""
    for pod in pods:
        held = waiting(pod)
        if held is not None and held.reason in FATAL:
            return held.sentence
    return ""


def refused(conditions: Iterable[Json]) -> str:
    """Why no pod can be created (quota, admission, account), from a Deployment's conditions; "" if they can."""
    for condition in conditions:
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            event = {"reason": "FailedCreate", "message": condition.get("message", ""), "metadata": {}}
            found = not_created([event])
            return found.sentence if found else ""
    return ""


def explain_pods(pods: Iterable[Json]) -> str:
    """What holds the new pods, as far as they tell; "" if they are well."""
    every = list(pods)
    for pod in every:
        held = waiting(pod)
        if why := ended(pod) or (held.sentence if held else ""):
            return why
        for container in containers(pod):
            if not container.get("ready") and int(container.get("restartCount", 0)):
                return last_words(container)
    for pod in every:
        if not all(c.get("ready") for c in (pod.get("status") or {}).get("containerStatuses") or ()):
            return f"pod {pod['metadata']['name']} runs and does not answer its golden requests: kubectl describe it"
    return ""


def last_words(container: Json) -> str:
    """How a container ended the last time."""
    last = _last_end(container)
    said = last_line(last.get("message", ""))
    return (
        f"container {container['name']} ends at each start (exit {last.get('exitCode')}){f': {said}' if said else ''}"
    )


def _last_end(container: Json) -> dict[str, Any]:
    now = (container.get("state") or {}).get("terminated")
    return now or (container.get("lastState") or {}).get("terminated") or {}
