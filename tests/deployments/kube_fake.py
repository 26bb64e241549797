"""A Kubernetes API server of one process on loopback: a KubeStore over HTTP, with faults on demand.

Requests, watches from a version on, logs that go on, discovery, 409 on a name that is taken; it may be away, cut
connections, repeat and hold back events. Not covered: the objects (kube_store.py); controllers, which tests play.
"""

from __future__ import annotations

import itertools
import json
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.deployments.kube_store import Json, KubeStore, selected

COLLECTION = re.compile(
    r"(?P<collection>(?:/api/v1|/apis/[^/]+/[^/]+)(?:/namespaces/[^/]+)?/[a-z]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<sub>log|status|eviction))?"
)


class KubeFake(KubeStore):
    """`with KubeFake() as kube:`; then kube.kubeconfig(tmp_path) is what `connect` takes."""

    def __init__(self) -> None:
        super().__init__()
        self.on_create: dict[str, Callable[[Json], Any]] = {}
        self.faults: list[tuple[str, str, Callable[[], tuple[int, Json, dict[str, str]] | None]]] = []
        self.requests: list[tuple[str, str]] = []
        self.missing: set[str] = set()  # collections that are not defined
        self.groups: dict[str, dict[str, list[str]]] = {}  # further API groups: version -> plurals
        self.silent: set[str] = set()  # collections whose watches lag behind: they tell nothing for now
        self.cut_after = 0  # a watch is cut after so many events, once
        self.duplicates = False
        self.oldest = 0  # watches from before this version get 410
        self.down = False
        self._server: ThreadingHTTPServer | None = None
        self._sockets: set[socket.socket] = set()
        self.port = 0

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

    # --- what tests ask of the server

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

    # --- requests

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
                self._answer(http, *self.page(collection, query))
            elif "apply-patch" in (http.headers.get("Content-Type") or ""):
                self._answer(http, *self.apply(collection, body, dry=query.get("dryRun") == "All"))
            elif not self.has(collection, str(name)):
                self._answer(http, 404, {"message": f"{name} not found", "details": {"name": name}})
            elif http.command == "GET":
                self._answer(http, 200, self.get(collection, str(name)))
            elif http.command == "DELETE":
                self._answer(http, *self.delete(collection, str(name), body))
            else:
                self._answer(http, *self.patch(collection, str(name), body))
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

    def _create(self, http: BaseHTTPRequestHandler, collection: str, body: Json) -> Json | None:
        name = body["metadata"]["name"]
        if self.has(collection, name):
            self._answer(http, 409, {"reason": "AlreadyExists", "message": f"{name} already exists"})
            return None
        made = self.put(collection, body)
        self._answer(http, 201, made)
        return made

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
                if version <= since or where != collection or not selected(item, query):
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
