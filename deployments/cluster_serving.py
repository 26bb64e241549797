"""Rollouts of Deployments: apply, wait until every pod is a new one, compare, take away.

    rollouts = Rollouts(api, namespace)
    for item in serving_objects(serving, place): rollouts.apply(item)
    state = rollouts.wait(serving.name, seconds=600)     # .complete, or .failed with .reason

A bad version costs nothing: its pods never get ready, so no ready pod is taken away. It is given up early when a new
pod cannot come right by itself (rollout_diagnosis.py). Going back is applying the earlier version again.
Not covered: which version, the record and the registry (tasks.rolling_update).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from deployments.errors import GiveUp, TryAgain
from deployments.kube_api import APPLY_PATCH, ApiStatus, KubeApi
from deployments.pod_diagnosis import one_line
from deployments.rollout_diagnosis import explain_pods, hopeless, refused, stuck

MANAGER = "reprise"
REVISION = "deployment.kubernetes.io/revision"
PLURALS = {"Deployment": "deployments", "Service": "services", "PodDisruptionBudget": "poddisruptionbudgets"}
VERSIONS = {"Deployment": "apps/v1", "Service": "v1", "PodDisruptionBudget": "policy/v1"}
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 60.0
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RolloutState:
    """Where a rollout stands, or ended."""

    complete: bool  # every pod is of the newest template and available
    failed: bool  # it will not get there by itself
    reason: str  # one sentence
    revision: int
    stuck: bool = False  # somebody has to put something right, and may be about to


class Rollouts:
    """Deployments of one namespace."""

    def __init__(self, api: KubeApi, namespace: str) -> None:
        """Nothing is asked yet."""
        self.api, self.namespace = api, namespace

    def apply(self, item: Json) -> Json:
        """Create or change an object by server-side apply. Raises GiveUp if the server refuses it.

        The number of replicas is left alone where somebody else set it: an autoscaler, or `kubectl scale`.
        """
        return self._apply(item, dry=False)

    def drift(self, item: Json) -> list[str]:
        """What an apply of it would change in the live object's spec, as paths; the kind and name if it is missing."""
        live = self.find(item["metadata"]["name"], item["kind"])
        if live is None:
            return [f"{item['kind']} {item['metadata']['name']}"]
        wanted = self._apply(item, dry=True)
        return list(_differences(wanted.get("spec"), live.get("spec"), "spec"))

    def find(self, name: str, kind: str = "Deployment") -> Json | None:
        """The live object, or None."""
        return self.api.find(self._path(kind, name))

    def state(self, name: str) -> RolloutState:
        """Where the newest rollout stands. Raises GiveUp if there is no such Deployment."""
        item = self._deployment(name)
        spec, status = item["spec"], item.get("status") or {}
        revision = _revision(item)
        wanted, seen = int(spec.get("replicas", 1)), int(status.get("observedGeneration", 0))
        updated, available = int(status.get("updatedReplicas", 0)), int(status.get("availableReplicas", 0))
        reason = f"{updated} of {wanted} pods are new, {available} available"
        conditions: list[Json] = status.get("conditions") or []
        if seen < int(item["metadata"].get("generation", 0)):
            return RolloutState(
                complete=False, failed=False, reason="the controller has not looked at it yet", revision=revision
            )
        if updated == wanted and available == wanted and int(status.get("replicas", 0)) == wanted:
            reason = f"{wanted} of {wanted} pods are new and available"
            return RolloutState(complete=True, failed=False, reason=reason, revision=revision)
        pods = self._new_pods(item)
        progressing: Json = next((c for c in conditions if c["type"] == "Progressing"), {})
        if progressing.get("reason") == "ProgressDeadlineExceeded":
            why = explain_pods(pods) or refused(conditions) or one_line(progressing.get("message", ""))
            return RolloutState(complete=False, failed=True, reason=why, revision=revision)
        if why := hopeless(pods):
            return RolloutState(complete=False, failed=True, reason=why, revision=revision)
        if why := stuck(pods) or refused(conditions):
            return RolloutState(complete=False, failed=False, reason=why, revision=revision, stuck=True)
        return RolloutState(complete=False, failed=False, reason=reason, revision=revision)

    def wait(
        self,
        name: str,
        *,
        seconds: float,
        patience: float = PATIENCE_SECONDS,
        on_change: Callable[[str], None] | None = None,
    ) -> RolloutState:
        """Until it is complete or has failed. It counts as failed after `seconds`, or when something that somebody has
        to put right has been wrong for `patience` seconds. `on_change` hears new reasons."""
        until, told, stuck_since = time.monotonic() + seconds, "", 0.0
        while True:
            found = self.state(name)
            if found.reason != told and on_change:
                on_change(found.reason)
            told = found.reason
            if found.complete or found.failed:
                return found
            now = time.monotonic()
            stuck_since = (stuck_since or now) if found.stuck else 0.0
            if stuck_since and now - stuck_since > patience:
                return RolloutState(complete=False, failed=True, reason=found.reason, revision=found.revision)
            if now > until:
                why = explain_pods(self._new_pods(self._deployment(name))) or found.reason
                reason = f"not complete after {seconds:g} s: {why}"
                return RolloutState(complete=False, failed=True, reason=reason, revision=found.revision)
            time.sleep(POLL_SECONDS)

    def restarts(self, name: str) -> int:
        """How often containers of the newest template's pods were started anew."""
        pods = self._new_pods(self._deployment(name))
        statuses = [c for pod in pods for c in (pod.get("status") or {}).get("containerStatuses") or ()]
        return sum(int(c.get("restartCount", 0)) for c in statuses)

    def delete(self, name: str, *, seconds: float) -> None:
        """Deployment, budget and Service, if they are there; returns when the last pod is gone.

        Raises TryAgain if some are left after `seconds`.
        """
        self.api.delete(self._path("Deployment", name), propagation="Foreground")
        for kind in ("PodDisruptionBudget", "Service"):
            self.api.delete(self._path(kind, name), propagation="Background")
        until = time.monotonic() + seconds
        while self.find(name) is not None:
            if time.monotonic() > until:
                raise TryAgain(f"Deployment {name}: its pods are not gone after {seconds:g} s")
            time.sleep(POLL_SECONDS)

    def _apply(self, item: Json, *, dry: bool) -> Json:
        query = {"fieldManager": MANAGER, "force": "true", "fieldValidation": "Strict"} | (
            {"dryRun": "All"} if dry else {}
        )
        name = item["metadata"]["name"]
        if "replicas" in item.get("spec", {}) and self._scaled_by_others(name):
            item = {**item, "spec": {k: v for k, v in item["spec"].items() if k != "replicas"}}
        path = self._path(item["kind"], name)
        try:
            return self.api.request("PATCH", path, query=query, body=item, content_type=APPLY_PATCH)
        except ApiStatus as status:
            raise GiveUp(f"the Kubernetes API refused {item['kind']} {name}: {one_line(status.message)}") from status

    def _scaled_by_others(self, name: str) -> bool:
        """Whether somebody else set the number of replicas. Without that field an apply leaves theirs alone."""
        metadata = (self.find(name) or {}).get("metadata") or {}
        return any(
            entry.get("manager") != MANAGER and "f:replicas" in ((entry.get("fieldsV1") or {}).get("f:spec") or {})
            for entry in metadata.get("managedFields") or ()
        )

    def _deployment(self, name: str) -> Json:
        found = self.find(name)
        if found is None:
            raise GiveUp(f"no Deployment {name} in namespace {self.namespace}; nothing was deployed there")
        return found

    def _new_pods(self, item: Json) -> list[Json]:
        """Pods of the Deployment's newest ReplicaSet, those that leave already left out."""
        selector = ",".join(f"{k}={v}" for k, v in sorted(item["spec"]["selector"]["matchLabels"].items()))
        sets = self.api.get(f"/apis/apps/v1/namespaces/{self.namespace}/replicasets", labelSelector=selector)
        pods = self.api.get(f"/api/v1/namespaces/{self.namespace}/pods", labelSelector=selector)
        mine, newest = item["metadata"]["uid"], _revision(item)
        uids = {r["metadata"]["uid"] for r in _owned(sets, {mine}) if _revision(r) == newest}
        return [p for p in _owned(pods, uids) if not p["metadata"].get("deletionTimestamp")]

    def _path(self, kind: str, name: str) -> str:
        version = VERSIONS[kind]
        root = "apis" if "/" in version else "api"
        return f"/{root}/{version}/namespaces/{self.namespace}/{PLURALS[kind]}/{name}"


def _owned(listed: Json, uids: set[str]) -> Iterator[Json]:
    for item in listed.get("items") or ():
        if any(owner["uid"] in uids for owner in item["metadata"].get("ownerReferences") or ()):
            yield item


def _revision(item: Json) -> int:
    return int((item["metadata"].get("annotations") or {}).get(REVISION, 0))


def _differences(wanted: Any, live: Any, path: str) -> Iterator[str]:
    if isinstance(wanted, dict) and isinstance(live, dict):
        for key in sorted({*wanted, *live}):
            yield from _differences(wanted.get(key), live.get(key), f"{path}.{key}")
    elif isinstance(wanted, list) and isinstance(live, list) and len(wanted) == len(live):
        for number, (one, other) in enumerate(zip(wanted, live, strict=True)):
            yield from _differences(one, other, f"{path}[{number}]")
    elif wanted != live:
        yield path
