"""The objects of a Kubernetes cluster of one process, as tests script them: versions, a history, and how they change.

It keeps what the Runner relies on (resourceVersion, uid, label selectors, server-side apply, finalizers of a foreground
deletion) and plays no controller: tests do that, by hand or by `on_create` of kube_fake.py, which serves it over HTTP.
There are a namespace with what its pods need, and room on each node, so that a preflight has nothing to say.
"""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

Json = dict[str, Any]
JOBS, TRAININGS = "/apis/batch/v1/namespaces/ns/jobs", "/apis/kubeflow.org/v1/namespaces/ns/pytorchjobs"
PODS = "/api/v1/namespaces/ns/pods"
NODES = "/api/v1/nodes"
NAMESPACES, ACCOUNTS = "/api/v1/namespaces", "/api/v1/namespaces/ns/serviceaccounts"
CLAIMS = "/api/v1/namespaces/ns/persistentvolumeclaims"
ROOM = {"cpu": "100000", "memory": "1Pi", "pods": "100000", "nvidia.com/gpu": "8"}


def timestamp(ago: float = 0.0) -> str:
    return datetime.fromtimestamp(time.time() - ago, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class KubeStore:
    """Objects by collection (the path of its list) and name. Safe for many threads."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.objects: dict[str, dict[str, Json]] = {}
        self.history: list[tuple[int, str, str, Json]] = []  # version, collection, type, object
        self.logs: dict[str, list[str]] = {}  # pod -> lines with timestamps
        self.open_logs: set[str] = set()  # pods whose log goes on
        self.foreground: set[str] = set()  # collections whose deletions wait for somebody to `remove`
        self.applied: dict[tuple[str, str], Json] = {}  # what server-side apply was given last
        self._versions = itertools.count(100)
        self.version = 100
        self.put(NAMESPACES, {"metadata": {"name": "ns"}, "status": {"phase": "Active"}})
        for account in ("reprise-step", "reprise-deploy", "reprise-serve"):
            self.put(ACCOUNTS, {"metadata": {"name": account, "namespace": "ns"}})
        bound = {"spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Bound"}}
        self.put(CLAIMS, {"metadata": {"name": "reprise", "namespace": "ns"}, **bound})

    def get(self, collection: str, name: str) -> Json:
        with self.lock:
            return copy.deepcopy(self.objects[collection][name])

    def has(self, collection: str, name: str) -> bool:
        with self.lock:
            return name in self.objects.get(collection, {})

    def put(self, collection: str, item: Json) -> Json:
        """Create or change, with a new version."""
        with self.changed:
            there = self.objects.setdefault(collection, {})
            name = item["metadata"]["name"]
            kind = "MODIFIED" if name in there else "ADDED"
            item = copy.deepcopy(item)
            item["metadata"].setdefault("uid", f"uid-{collection.rsplit('/', 1)[1]}-{name}-{self.version}")
            item["metadata"].setdefault("creationTimestamp", timestamp())
            if collection == NODES:
                item.setdefault("status", {}).setdefault("allocatable", ROOM)
            self._record(collection, kind, item)
            there[name] = item
            return copy.deepcopy(item)

    def change(self, collection: str, name: str, **status: Any) -> Json:
        """Merge into an object's status."""
        with self.changed:
            item = self.get(collection, name)
            item.setdefault("status", {}).update(status)
            return self.put(collection, item)

    def remove(self, collection: str, name: str) -> None:
        with self.changed:
            item = self.objects[collection].pop(name)
            self._record(collection, "DELETED", item)

    def pod_for(self, owner: Json, name: str = "", *, node: str = "n1", container: str = "step", **status: Any) -> Json:
        """A pod of the object, with its labels."""
        pod = {
            "metadata": {
                "name": name or owner["metadata"]["name"] + "-abcde",
                "labels": dict(owner["metadata"]["labels"]),
                "ownerReferences": [{"uid": owner["metadata"]["uid"], "controller": True}],
            },
            "spec": {
                "nodeName": node,
                "terminationGracePeriodSeconds": 5,
                "containers": [{"name": container}],
            },
            "status": {"phase": "Running", "startTime": timestamp(), **status},
        }
        return self.put(PODS, pod)

    def end_pod(self, name: str, code: int | None, *, container: str = "step", **terminated: Any) -> Json:
        state = {"terminated": {"exitCode": code, "finishedAt": timestamp(), **terminated}}
        statuses = [] if code is None else [{"name": container, "state": state}]
        return self.change(PODS, name, phase="Failed" if code else "Succeeded", containerStatuses=statuses)

    def condition(self, collection: str, name: str, kind: str, reason: str = "", message: str = "") -> Json:
        with self.lock:
            found = list(self.get(collection, name).get("status", {}).get("conditions", []))
        fresh = {"type": kind, "status": "True", "reason": reason, "message": message}
        return self.change(collection, name, conditions=[*found, {**fresh, "lastTransitionTime": timestamp()}])

    def wait(self, what: Callable[[], Any], seconds: float = 8.0) -> Any:
        until = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < until, "it did not happen in time"
            time.sleep(0.01)
        return found

    def _record(self, collection: str, kind: str, item: Json) -> None:
        self.version = next(self._versions) + 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, collection, kind, copy.deepcopy(item)))
        self.changed.notify_all()

    # --- what an API server does with them: a status code and an answer

    def apply(self, collection: str, body: Json, *, dry: bool) -> tuple[int, Json]:
        """Server-side apply by one manager: what it applied before and leaves out now is taken away."""
        name = body["metadata"]["name"]
        item = self.get(collection, name) if self.has(collection, name) else {}
        before = copy.deepcopy(item.get("spec"))
        fresh = {key: value for key, value in body.items() if key != "status"}
        _prune(item, self.applied.get((collection, name), {}), fresh)
        _merge(item, copy.deepcopy(fresh))
        if item.get("spec") != before:
            item["metadata"]["generation"] = int(item["metadata"].get("generation", 0)) + 1
        if not dry:
            self.applied[collection, name] = copy.deepcopy(fresh)
            item = self.put(collection, item)
        return 200, item

    def patch(self, collection: str, name: str, body: Any) -> tuple[int, Json]:
        """A merge patch; a JSON patch is only recorded."""
        item = self.get(collection, name)
        if isinstance(body, dict):
            _merge(item, body)
        return 200, self.put(collection, item)

    def delete(self, collection: str, name: str, body: Json) -> tuple[int, Json]:
        """At once, or, in a collection of `foreground`, marked until somebody removes it."""
        item = self.get(collection, name)
        wanted = (body.get("preconditions") or {}).get("uid")
        if wanted and wanted != item["metadata"]["uid"]:
            return 409, {"reason": "Conflict", "message": "uid"}
        if collection in self.foreground:
            grace = body.get("gracePeriodSeconds", 5 if collection == PODS else 0)
            item["metadata"]["deletionTimestamp"] = timestamp(-grace)
            item["metadata"]["deletionGracePeriodSeconds"] = grace
            self.put(collection, item)
        else:
            self.remove(collection, name)
        return 200, {"kind": "Status"}

    def page(self, collection: str, query: dict[str, str]) -> tuple[int, Json]:
        """A page of those that are selected."""
        items = [i for i in self.objects.get(collection, {}).values() if selected(i, query)]
        if (field := query.get("fieldSelector", "")).startswith("involvedObject"):
            wanted = dict(part.split("=", 1) for part in field.split(","))
            items = [i for i in items if i.get("involvedObject", {}).get("name") == wanted["involvedObject.name"]]
        start, limit = int(query.get("continue") or 0), int(query.get("limit") or 500)
        metadata = {"resourceVersion": str(self.version)}
        if len(items) > start + limit:
            metadata["continue"] = str(start + limit)
        return 200, {"metadata": metadata, "items": items[start : start + limit]}


def selected(item: Json, query: dict[str, str]) -> bool:
    """By its labels."""
    labels = item["metadata"].get("labels") or {}
    for part in filter(None, query.get("labelSelector", "").split(",")):
        key, equals, value = part.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True


def _merge(into: Json, patch: Json) -> None:
    for key, value in patch.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _prune(item: Json, before: Json, fresh: Json) -> None:
    for key, value in before.items():
        if key not in fresh:
            item.pop(key, None)
        elif isinstance(value, dict) and isinstance(fresh[key], dict) and isinstance(item.get(key), dict):
            _prune(item[key], value, fresh[key])
