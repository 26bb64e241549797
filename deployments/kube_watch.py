"""One list and one watch per kind for the whole process, feeding as many waiters as there are.

    with watch.follow(name, event) as following:    # objects that carry the label reprise.dev/workload=name
        event.wait(5); event.clear(); following.objects()

A watch that is cut goes on where it was, one that is too old (410) lists again; what vanished meanwhile counts as
deleted. Events that come twice or late change nothing: an object's resourceVersion only grows. A follower keeps the
last state of what it saw, also after its deletion, because the end of a pod is told in its last state.
Not covered: what the objects mean (cluster.py, pod_causes.py).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from deployments.errors import StepError, TryAgain, Unreachable
from deployments.kube_api import ApiStatus, KubeApi, Lines
from deployments.labels import MANAGED_SELECTOR, REQUEST_ANNOTATION, WORKLOAD_LABEL

QUIET_SECONDS = 90.0  # a server sends a bookmark about every minute; a connection that is silent for longer is dead
PAGE = "500"
SELECTOR = f"{MANAGED_SELECTOR},{WORKLOAD_LABEL}"
TOMBSTONES = 4096  # deleted objects that late events could bring back
GONE = "gone"  # in the last state of an object that is away
Json = dict[str, Any]


@dataclass(kw_only=True)
class Following:
    """What one waiter sees. `event` is set at each change."""

    watch: SharedWatch
    event: threading.Event
    seen: dict[str, Json] = field(default_factory=dict)  # by uid, the last state

    def objects(self) -> list[Json]:
        """The last state of each object, those that are gone included. Raises what ended the watch."""
        with self.watch.lock:
            self.watch.check()
            return list(self.seen.values())

    def values_of(self, label: str) -> set[str]:
        """The values that a label has among all objects of the watch, those of other waiters included."""
        with self.watch.lock:
            labels = (item["metadata"].get("labels") or {} for item in self.watch.known.values())
            return {found[label] for found in labels if label in found}

    def put(self, item: Json) -> None:
        """Tell what a request answered, so that the watch need not have caught up."""
        with self.watch.lock:
            self.watch.changed(trimmed(item))


class SharedWatch:
    """The one watch of a kind. Its thread starts with the first follower and lives until `close`."""

    def __init__(self, api: KubeApi, path: str, *, selector: str = SELECTOR) -> None:
        """`path`: of the collection, such as /apis/batch/v1/namespaces/N/jobs."""
        self.api, self.path, self.selector = api, path, selector
        self.lock = threading.RLock()
        self.known: dict[str, Json] = {}  # by uid
        self._followers: dict[str, list[Following]] = defaultdict(list)  # by workload
        self._buried: OrderedDict[str, int] = OrderedDict()  # uid -> resourceVersion of its deletion
        self._listed, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._lines: Lines | None = None
        self._error: StepError | None = None
        self._version = ""  # of the last event: where a watch that was cut goes on; "" is to list
        self._away_since: float | None = None

    @contextlib.contextmanager
    def follow(self, workload: str, event: threading.Event) -> Iterator[Following]:
        """Follow the objects of a workload, from a complete list on. Raises PreflightError or Unreachable."""
        following = Following(watch=self, event=event)
        with self.lock:
            if self._thread is None or not self._thread.is_alive():
                self._error, self._away_since = None, None
                self._listed.clear()
                self._thread = threading.Thread(target=self._run, name=f"watch {self.path}", daemon=True)
                self._thread.start()
        while not self._listed.wait(1.0):
            self.check()
        self.check()
        with self.lock:
            self._followers[workload].append(following)
            following.seen = {u: i for u, i in self.known.items() if workload_of(i) == workload}
        try:
            yield following
        finally:
            with self.lock:
                self._followers[workload].remove(following)
                if not self._followers[workload]:
                    del self._followers[workload]

    def check(self) -> None:
        """Raise what ended the watch, or Unreachable when the server has been away for longer than its patience."""
        with self.lock:
            if self._error is not None:
                raise self._error
            away = time.monotonic() - self._away_since if self._away_since is not None else 0.0
            if away > self.api.patience:
                raise Unreachable(
                    f"the Kubernetes API at {self.api.host} has not answered for {away:.0f} s; what runs there goes "
                    "on, run again to adopt it"
                )

    def close(self) -> None:
        """End the watch and its thread; whoever still follows gets TryAgain."""
        with self.lock:
            self._error = TryAgain("whoever waited here has to leave; what runs in the cluster goes on")
            for following in itertools.chain.from_iterable(self._followers.values()):
                following.event.set()
        self._closed.set()
        if (lines := self._lines) is not None:
            lines.close()
        if self._thread is not None:
            self._thread.join(5)

    def changed(self, item: Json, *, deleted: bool = False) -> None:
        """Take one state of one object; older ones than the known one are ignored. Call it under the lock."""
        uid, version = uid_of(item), version_of(item)
        known = self.known.get(uid)
        if uid in self._buried or (known is not None and not deleted and version <= version_of(known)):
            return
        if deleted:
            self.known.pop(uid, None)
            self._buried[uid] = version
            while len(self._buried) > TOMBSTONES:
                self._buried.popitem(last=False)
        else:
            self.known[uid] = item
        for following in self._followers.get(workload_of(item), ()):
            following.seen[uid] = {**item, GONE: True} if deleted else item
            following.event.set()

    def _run(self) -> None:
        delay = 0.2
        while not self._closed.is_set():
            began, why = time.monotonic(), ""
            try:
                if not self._version:
                    self._list()
                    self._listed.set()
                self._watch()
            except ApiStatus as status:
                self._version = ""  # 410, too old: what was missed is in a new list
                why = "" if status.code == 410 else str(status)
            except Unreachable as error:
                why = str(error)
            except StepError as error:
                return self._end(error)
            except (OSError, ValueError, KeyError) as error:  # cut, silent, or half a line
                why = str(error)
            if time.monotonic() - began > 5:
                delay = 0.2
            if why:
                with self.lock:
                    self._away_since = self._away_since or began
                    if time.monotonic() - self._away_since > self.api.patience:
                        self._wake_all()
            if why or time.monotonic() - began < 1:  # also a server that ends each watch at once
                self._closed.wait(delay * random.uniform(0.5, 1.0))
                delay = min(5.0, delay * 2)

    def _end(self, error: StepError) -> None:
        with self.lock:
            self._error = error
            self._wake_all()
        self._listed.set()

    def _wake_all(self) -> None:
        for followers in self._followers.values():
            for following in followers:
                following.event.set()

    def _list(self) -> None:
        """Read everything, page by page, and find out what is gone."""
        found: dict[str, Json] = {}
        query = {"labelSelector": self.selector, "limit": PAGE}
        while True:
            page = self.api.request("GET", self.path, query=query, patience=0)
            for item in page.get("items") or []:
                found[uid_of(item)] = trimmed(item)
            more = page["metadata"].get("continue")
            if not more:
                break
            query["continue"] = more
        version = str(page["metadata"]["resourceVersion"])
        with self.lock:
            self._version, self._away_since = version, None
            for item in found.values():
                self.changed(item)
            for uid, item in list(self.known.items()):
                if uid not in found and version_of(item) <= _number(version):
                    self.changed(item, deleted=True)

    def _watch(self) -> None:
        """Take events until the server ends the watch. Raises ApiStatus 410 when our version is too old."""
        query = {
            "labelSelector": self.selector,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(random.randint(240, 300)),  # not all watches of a cluster at once
        }
        self._lines = self.api.stream(self.path, query, quiet_seconds=QUIET_SECONDS)
        self._away_since = None
        if self._closed.is_set():  # while it was being opened
            self._lines.close()
        for line in self._lines:
            event = json.loads(line)
            item = event["object"]
            if event["type"] == "ERROR":
                raise ApiStatus(int(item.get("code") or 500), str(item.get("reason")), str(item.get("message")))
            with self.lock:
                self._away_since = None
                if version_of(item) > _number(self._version):
                    self._version = item["metadata"]["resourceVersion"]
                if event["type"] != "BOOKMARK":
                    self.changed(trimmed(item), deleted=event["type"] == "DELETED")


def is_gone(item: Json) -> bool:
    """Whether the object was deleted and is away, in the state that is given."""
    return bool(item.get(GONE))


def trimmed(item: Json) -> Json:
    """The object without what nobody reads here and costs memory: managed fields, the request, a pod's containers."""
    metadata = {k: v for k, v in item["metadata"].items() if k != "managedFields"}
    if annotations := metadata.get("annotations"):
        metadata["annotations"] = {k: v for k, v in annotations.items() if k != REQUEST_ANNOTATION}
    keep = ("nodeName", "nodeSelector", "terminationGracePeriodSeconds", "suspend", "runPolicy", "parallelism")
    spec = {k: v for k, v in (item.get("spec") or {}).items() if k in keep}
    replicas = (item.get("spec") or {}).get("pytorchReplicaSpecs")
    if replicas:
        spec["pytorchReplicaSpecs"] = {k: {"replicas": v.get("replicas", 1)} for k, v in replicas.items()}
    return {"metadata": metadata, "spec": spec, "status": item.get("status") or {}}


def uid_of(item: Json) -> str:
    """The identity of one life of an object."""
    return str(item["metadata"]["uid"])


def workload_of(item: Json) -> str:
    """The workload that the object belongs to."""
    return str((item["metadata"].get("labels") or {}).get(WORKLOAD_LABEL, ""))


def version_of(item: Json) -> int:
    """The object's resourceVersion; Kubernetes promises since 1.35 that those of one kind can be compared."""
    return _number(str(item["metadata"].get("resourceVersion", "0")))


def _number(version: str) -> int:
    return int(version) if version.isdigit() else 0
