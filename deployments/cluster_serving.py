"""Rollouts of Deployments: apply, wait until every pod is a new one, or take it back.

    rollouts = Rollouts(cluster.api, namespace)
    for item in serving_objects(serving, place): rollouts.apply(item)
    state = rollouts.wait(serving.name, seconds=300)
    if not state.complete: rollouts.undo(serving.name); rollouts.wait(serving.name, seconds=300)

A bad version costs nothing: its pods never get ready, so no ready pod is taken away. It is given up early when a new
pod cannot come right by itself. Not covered: which version (tasks), the same transaction in the registry (tasks).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deployments.errors import GiveUp
from deployments.kube_api import APPLY_PATCH, ApiStatus, KubeApi
from deployments.pod_diagnosis import HOPELESS, containers, ended, last_line, one_line, waiting

JSON_PATCH = "application/json-patch+json"
MANAGER = "reprise"
REVISION = "deployment.kubernetes.io/revision"
PLURALS = {"Deployment": "deployments", "Service": "services", "PodDisruptionBudget": "poddisruptionbudgets"}
CRASHES = 2  # of a new pod's container: more of them is a loop, not bad luck
POLL_SECONDS = 0.5
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RolloutState:
    """Where a rollout stands, or ended."""

    complete: bool  # every pod is of the newest template and available
    failed: bool  # it will not get there by itself
    reason: str  # one sentence
    revision: int


class Rollouts:
    """Deployments of one namespace."""

    def __init__(self, api: KubeApi, namespace: str) -> None:
        """Nothing is asked yet."""
        self.api, self.namespace = api, namespace

    def apply(self, item: Json) -> Json:
        """Create or change an object by server-side apply. Raises GiveUp if the server refuses it."""
        query = {"fieldManager": MANAGER, "force": "true", "fieldValidation": "Strict"}
        path = self._path(item["apiVersion"], item["kind"], item["metadata"]["name"])
        try:
            return self.api.request("PATCH", path, query=query, body=item, content_type=APPLY_PATCH)
        except ApiStatus as status:
            what = f"{item['kind']} {item['metadata']['name']}"
            raise GiveUp(f"the Kubernetes API refused {what}: {one_line(status.message)}") from status

    def state(self, name: str) -> RolloutState:
        """Where the newest rollout stands. Raises GiveUp if there is no such Deployment."""
        item = self._deployment(name)
        spec, status = item["spec"], item.get("status") or {}
        revision = int((item["metadata"].get("annotations") or {}).get(REVISION, 0))
        wanted, seen = int(spec.get("replicas", 1)), int(status.get("observedGeneration", 0))
        updated, available = int(status.get("updatedReplicas", 0)), int(status.get("availableReplicas", 0))
        complete, failed, reason = False, False, f"{updated} of {wanted} pods are new, {available} available"
        conditions: list[Json] = status.get("conditions") or []
        progressing = next((c for c in conditions if c["type"] == "Progressing"), {})
        if seen < int(item["metadata"]["generation"]):
            reason = "the controller has not looked at it yet"
        elif updated == wanted and available == wanted and int(status.get("replicas", 0)) == wanted:
            complete, reason = True, f"{wanted} of {wanted} pods are new and available"
        elif progressing.get("reason") == "ProgressDeadlineExceeded":
            failed, reason = True, self._why(item) or one_line(progressing.get("message", ""))
        elif why := self._hopeless(item):
            failed, reason = True, why
        return RolloutState(complete=complete, failed=failed, reason=reason, revision=revision)

    def wait(self, name: str, *, seconds: float, on_change: Callable[[str], None] | None = None) -> RolloutState:
        """Until it is complete or has failed, which it counts as after `seconds`. `on_change` hears new reasons."""
        until, told = time.monotonic() + seconds, ""
        while True:
            found = self.state(name)
            if found.reason != told and on_change:
                on_change(found.reason)
            told = found.reason
            if found.complete or found.failed:
                return found
            if time.monotonic() > until:
                why = self._why(self._deployment(name)) or found.reason
                reason = f"not complete after {seconds:g} s: {why}"
                return RolloutState(complete=False, failed=True, reason=reason, revision=found.revision)
            time.sleep(POLL_SECONDS)

    def undo(self, name: str) -> int:
        """Take the template of the revision before the newest; returns that revision.

        Raises GiveUp if there is none: then the first version failed, and nothing was in service before.
        """
        item = self._deployment(name)
        newest = int((item["metadata"].get("annotations") or {}).get(REVISION, 0))
        older = [r for r in self._replica_sets(item) if _revision(r) < newest]
        if not older:
            raise GiveUp(f"Deployment {name}: no revision before {newest} to go back to; delete it, or deploy another")
        before = max(older, key=_revision)
        template = before["spec"]["template"]
        template["metadata"]["labels"].pop("pod-template-hash", None)
        patch = [{"op": "replace", "path": "/spec/template", "value": template}]
        self.api.request("PATCH", self._path("apps/v1", "Deployment", name), body=patch, content_type=JSON_PATCH)
        return _revision(before)

    def _deployment(self, name: str) -> Json:
        found = self.api.find(self._path("apps/v1", "Deployment", name))
        if found is None:
            raise GiveUp(f"no Deployment {name} in namespace {self.namespace}; nothing was deployed there")
        return found

    def _replica_sets(self, item: Json) -> list[Json]:
        path = f"/apis/apps/v1/namespaces/{self.namespace}/replicasets"
        listed = self.api.get(path, labelSelector=_selector(item)).get("items") or []
        uid = item["metadata"]["uid"]
        return [r for r in listed if any(o["uid"] == uid for o in r["metadata"].get("ownerReferences") or ())]

    def _new_pods(self, item: Json) -> list[Json]:
        newest = (item["metadata"].get("annotations") or {}).get(REVISION)
        sets = [r for r in self._replica_sets(item) if r["metadata"].get("annotations", {}).get(REVISION) == newest]
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        pods = self.api.get(path, labelSelector=_selector(item)).get("items") or []
        uids = {r["metadata"]["uid"] for r in sets}
        return [p for p in pods if any(o["uid"] in uids for o in p["metadata"].get("ownerReferences") or ())]

    def _hopeless(self, item: Json) -> str:
        """Why a new pod will not come right by itself; "" while it may."""
        for pod in self._new_pods(item):
            held = waiting(pod)
            if held is not None and held.reason in HOPELESS:
                return held.sentence
            for container in containers(pod):
                if int(container.get("restartCount", 0)) >= CRASHES:
                    return _last_words(container)
        return ""

    def _why(self, item: Json) -> str:
        for pod in self._new_pods(item):
            held = waiting(pod)
            if why := ended(pod) or (held.sentence if held else ""):
                return why
            for container in containers(pod):
                if not container.get("ready") and int(container.get("restartCount", 0)):
                    return _last_words(container)
        for pod in self._new_pods(item):
            if not all(c.get("ready") for c in (pod.get("status") or {}).get("containerStatuses") or ()):
                return f"pod {pod['metadata']['name']} runs and does not answer its golden request: kubectl describe it"
        return ""

    def _path(self, version: str, kind: str, name: str) -> str:
        root = "apis" if "/" in version else "api"
        return f"/{root}/{version}/namespaces/{self.namespace}/{PLURALS[kind]}/{name}"


def _selector(item: Json) -> str:
    return ",".join(f"{k}={v}" for k, v in sorted(item["spec"]["selector"]["matchLabels"].items()))


def _revision(item: Json) -> int:
    return int((item["metadata"].get("annotations") or {}).get(REVISION, 0))


def _last_words(container: Json) -> str:
    last = (container.get("lastState") or {}).get("terminated") or {}
    last = last or (container.get("state") or {}).get("terminated") or {}
    said = last_line(last.get("message", ""))
    return (
        f"container {container['name']} ends at each start (exit {last.get('exitCode')}){f': {said}' if said else ''}"
    )
