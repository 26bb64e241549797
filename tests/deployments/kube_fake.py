"""A Kubernetes API server of one process on loopback, scripted by tests: objects, watches, logs, and faults on demand.

It keeps what the Runner relies on (resourceVersion, uid, 409 on a name that is taken, label selectors, watches from a
version on, finalizers of a foreground deletion) and plays no controller: tests do that, by `on_create` or by hand.
There are a namespace with what its pods need, and room on each node, so that a preflight has nothing to say.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Json = dict[str, Any]
JOBS, TRAININGS = "/apis/batch/v1/namespaces/ns/jobs", "/apis/kubeflow.org/v1/namespaces/ns/pytorchjobs"
PODS = "/api/v1/namespaces/ns/pods"
NODES = "/api/v1/nodes"
NAMESPACES, ACCOUNTS = "/api/v1/namespaces", "/api/v1/namespaces/ns/serviceaccounts"
CLAIMS = "/api/v1/namespaces/ns/persistentvolumeclaims"
ROOM = {"cpu": "100000", "memory": "1Pi", "pods": "100000", "nvidia.com/gpu": "8"}
COLLECTION = re.compile(
    r"(?P<collection>(?:/api/v1|/apis/[^/]+/[^/]+)(?:/namespaces/[^/]+)?/[a-z]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<sub>log|status|eviction))?"
)


def timestamp(ago: float = 0.0) -> str:
    return datetime.fromtimestamp(time.time() - ago, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class KubeFake:
    """`with KubeFake() as kube:`; then kube.kubeconfig(tmp_path) is what `connect` takes."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.objects: dict[str, dict[str, Json]] = {}
        self.history: list[tuple[int, str, str, Json]] = []  # version, collection, type, object
        self.logs: dict[str, list[str]] = {}  # pod -> lines with timestamps
        self.open_logs: set[str] = set()  # pods whose log goes on
        self.on_create: dict[str, Callable[[Json], Any]] = {}
        self.faults: list[tuple[str, str, Callable[[], tuple[int, Json, dict[str, str]] | None]]] = []
        self.requests: list[tuple[str, str]] = []
        self.foreground: set[str] = set()  # collections whose deletions wait for `finish_deletion`
        self.missing: set[str] = set()  # collections that are not defined
        self.groups: dict[str, dict[str, list[str]]] = {}  # further API groups: version -> plurals
        self.applied: dict[tuple[str, str], Json] = {}  # what server-side apply was given last
        self.silent: set[str] = set()  # collections whose watches lag behind: they tell nothing for now
        self.cut_after = 0  # a watch is cut after so many events, once
        self.duplicates = False
        self.oldest = 0  # watches from before this version get 410
        self._versions = itertools.count(100)
        self.version = 100
        self.down = False
        self._server: ThreadingHTTPServer | None = None
        self._sockets: set[socket.socket] = set()
        self.port = 0
        self.put(NAMESPACES, {"metadata": {"name": "ns"}, "status": {"phase": "Active"}})
        for account in ("reprise-step", "reprise-deploy", "reprise-serve"):
            self.put(ACCOUNTS, {"metadata": {"name": account, "namespace": "ns"}})
        bound = {"spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Bound"}}
        self.put(CLAIMS, {"metadata": {"name": "reprise", "namespace": "ns"}, **bound})

    # --- life

    def __enter__(self) -> KubeFake:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one write per answer: two cost 40 ms by Nagle's algorithm and a delayed ACK

            def setup(self) -> None:
                super().setup()
                fake._sockets.add(self.connection)

            def finish(self) -> None:
                fake._sockets.discard(self.connection)
                with _quiet():
                    super().finish()

            def log_message(self, *_: object) -> None:
                return

            def _any(self) -> None:
                with _quiet():
                    fake._handle(self)

            do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _any

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_: object) -> None:
                return

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self.down = False
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections and cut those that are open."""
        self.down = True
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self.cut()
        with self.changed:
            self.changed.notify_all()

    def cut(self) -> None:
        """Cut every open connection."""
        for sock in list(self._sockets):
            with _quiet():
                sock.shutdown(socket.SHUT_RDWR)

    def kubeconfig(self, folder: Path) -> str:
        path = folder / "kubeconfig"
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
        document = {"clusters": [cluster], "contexts": [context], "users": [{"name": "u", "user": {}}]}
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "c", **document}))
        return str(path)

    # --- objects, by tests

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

    def fail(self, method: str, pattern: str, status: int, times: int = 1, message: str = "no", **headers: str) -> None:
        """Answer the next requests that match with an error; status 0 closes the connection without an answer."""
        left = itertools.count(times, -1)

        def fault() -> tuple[int, Json, dict[str, str]] | None:
            if next(left) <= 0:
                return None
            return status, {"kind": "Status", "code": status, "message": message, "reason": "Because"}, headers

        self.faults.append((method, pattern, fault))

    def count(self, method: str, pattern: str) -> int:
        with self.lock:
            return sum(m == method and re.search(pattern, p) is not None for m, p in self.requests)

    def wait(self, what: Callable[[], Any], seconds: float = 8.0) -> Any:
        until = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < until, "it did not happen in time"
            time.sleep(0.01)
        return found

    # --- HTTP

    def _record(self, collection: str, kind: str, item: Json) -> None:
        self.version = next(self._versions) + 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, collection, kind, copy.deepcopy(item)))
        self.changed.notify_all()

    def _handle(self, http: BaseHTTPRequestHandler) -> None:
        length = int(http.headers.get("Content-Length") or 0)
        body = json.loads(http.rfile.read(length)) if length else {}
        url = urllib.parse.urlsplit(http.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        with self.lock:
            self.requests.append((http.command, http.path))
            for method, pattern, fault in self.faults:
                if method == http.command and re.search(pattern, http.path):
                    answer = fault()
                    if answer is not None and answer[0] == 0:
                        http.close_connection = True
                        return
                    if answer is not None:
                        return self._answer(http, *answer)
        found = COLLECTION.fullmatch(url.path)
        if found is None:
            return self._discovery(http, url.path)
        collection, name, sub = found["collection"], found["name"], found["sub"]
        if collection in self.missing:
            return self._answer(http, 404, {"message": "404 page not found"})
        if collection.endswith(("selfsubjectrulesreviews", "selfsubjectaccessreviews")):  # who asks may do everything
            rules = [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}]
            return self._answer(http, 201, {"status": {"allowed": True, "incomplete": False, "resourceRules": rules}})
        if sub == "log":
            return self._log(http, str(name), query)
        if http.command == "GET" and query.get("watch"):
            return self._watch(http, collection, query)
        with self.changed:
            made: Json | None = None
            if http.command == "POST":
                made = self._create(http, collection, body)
            elif http.command == "GET" and not name:
                self._list(http, collection, query)
            elif "apply-patch" in (http.headers.get("Content-Type") or ""):
                self._apply(http, collection, body, dry=query.get("dryRun") == "All")
            elif not self.has(collection, str(name)):
                self._answer(http, 404, {"message": f"{name} not found", "details": {"name": name}})
            elif http.command == "GET":
                self._answer(http, 200, self.get(collection, str(name)))
            elif http.command == "DELETE":
                self._delete(http, collection, str(name), body)
            else:
                item = self.get(collection, str(name))
                if isinstance(body, dict):  # a JSON patch is only recorded
                    _merge(item, body)
                self._answer(http, 200, self.put(collection, item))
        if made is not None and collection in self.on_create:
            threading.Thread(target=self.on_create[collection], args=(made,), daemon=True).start()

    def _discovery(self, http: BaseHTTPRequestHandler, path: str) -> None:
        """What is defined; no group but Kubeflow's and what `groups` says."""
        groups = {"kubeflow.org": {"v1": ["pytorchjobs"]}, **self.groups}
        if path == "/version":
            return self._answer(http, 200, {"gitVersion": "v1.36.2"})
        if path == "/apis":
            made = [{"name": g, "versions": [{"groupVersion": f"{g}/{v}"} for v in vs]} for g, vs in groups.items()]
            return self._answer(http, 200, {"groups": made})
        group, _, version = path.removeprefix("/apis/").partition("/")
        if not path.startswith("/apis/") or group not in groups or version not in ("", *groups[group]):
            return self._answer(http, 404, {"message": "404 page not found"})
        if version:
            return self._answer(http, 200, {"resources": [{"name": name} for name in groups[group][version]]})
        return self._answer(http, 200, {"versions": [{"version": v} for v in groups[group]]})

    def _apply(self, http: BaseHTTPRequestHandler, collection: str, body: Json, *, dry: bool) -> None:
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
        self._answer(http, 200, item)

    def _create(self, http: BaseHTTPRequestHandler, collection: str, body: Json) -> Json | None:
        name = body["metadata"]["name"]
        if self.has(collection, name):
            self._answer(http, 409, {"reason": "AlreadyExists", "message": f"{name} already exists"})
            return None
        made = self.put(collection, body)
        self._answer(http, 201, made)
        return made

    def _delete(self, http: BaseHTTPRequestHandler, collection: str, name: str, body: Json) -> None:
        item = self.get(collection, name)
        wanted = (body.get("preconditions") or {}).get("uid")
        if wanted and wanted != item["metadata"]["uid"]:
            return self._answer(http, 409, {"reason": "Conflict", "message": "uid"})
        if collection in self.foreground:
            grace = body.get("gracePeriodSeconds", 5 if collection == PODS else 0)
            item["metadata"]["deletionTimestamp"] = timestamp(-grace)
            item["metadata"]["deletionGracePeriodSeconds"] = grace
            self.put(collection, item)
        else:
            self.remove(collection, name)
        return self._answer(http, 200, {"kind": "Status"})

    def _list(self, http: BaseHTTPRequestHandler, collection: str, query: dict[str, str]) -> None:
        items = [i for i in self.objects.get(collection, {}).values() if _selected(i, query)]
        if (field := query.get("fieldSelector", "")).startswith("involvedObject"):
            wanted = dict(part.split("=", 1) for part in field.split(","))
            items = [i for i in items if i.get("involvedObject", {}).get("name") == wanted["involvedObject.name"]]
        start, limit = int(query.get("continue") or 0), int(query.get("limit") or 500)
        metadata = {"resourceVersion": str(self.version)}
        if len(items) > start + limit:
            metadata["continue"] = str(start + limit)
        self._answer(http, 200, {"metadata": metadata, "items": items[start : start + limit]})

    def _watch(self, http: BaseHTTPRequestHandler, collection: str, query: dict[str, str]) -> None:
        since = int(query["resourceVersion"])
        if since < self.oldest:
            status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
            self._start_chunks(http)
            self._chunk(http, json.dumps({"type": "ERROR", "object": status}) + "\n")
            return self._chunk(http, "")
        self._start_chunks(http)
        sent, at = 0, 0
        while not self.down:
            with self.changed:
                fresh = [] if collection in self.silent else self.history[at:]
                at += len(fresh)
                if not fresh:
                    self.changed.wait(0.5)
            for version, where, kind, item in fresh:
                if version <= since or where != collection or not _selected(item, query):
                    continue
                line = json.dumps({"type": kind, "object": item}) + "\n"
                if self.cut_after and sent >= self.cut_after:
                    self.cut_after = 0
                    self._chunk(http, line[: len(line) // 2])  # half an event, then nothing
                    http.close_connection = True
                    http.connection.shutdown(socket.SHUT_RDWR)
                    return
                self._chunk(http, line * (2 if self.duplicates else 1))
                sent += 1

    def _log(self, http: BaseHTTPRequestHandler, pod: str, query: dict[str, str]) -> None:
        self._start_chunks(http)
        at, since = 0, query.get("sinceTime", "")
        while True:
            with self.changed:
                lines = self.logs.get(pod, [])
                fresh, at = lines[at:], len(lines)
                more = query.get("follow") and pod in self.open_logs and not self.down
                if not fresh and more:
                    self.changed.wait(0.2)
            for line in fresh:
                if line[:19] >= since[:19]:  # whole seconds, as the API has them
                    self._chunk(http, line + "\n")
            if not fresh and not more:
                return self._chunk(http, "")

    @staticmethod
    def _start_chunks(http: BaseHTTPRequestHandler) -> None:
        http.send_response(200)
        http.send_header("Transfer-Encoding", "chunked")
        http.end_headers()
        http.wfile.flush()

    @staticmethod
    def _chunk(http: BaseHTTPRequestHandler, text: str) -> None:
        data = text.encode()
        http.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        http.wfile.flush()

    @staticmethod
    def _answer(http: BaseHTTPRequestHandler, code: int, body: Json, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        http.send_response(code)
        for key, value in (headers or {}).items():
            http.send_header(key.replace("_", "-"), value)
        http.send_header("Content-Length", str(len(data)))
        http.end_headers()
        http.wfile.write(data)


class _quiet:
    """A connection that the other side has left is no news."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        return isinstance(error, OSError | ValueError)


def _selected(item: Json, query: dict[str, str]) -> bool:
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
