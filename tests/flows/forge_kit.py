"""A forge's status routes on a real socket, as each of the three documents them: paths, authorization, words, answers.

Written from GitHub's REST reference ("Create a commit status"), GitLab's ("Set commit pipeline status", and its refusal
to make the same transition twice) and Gitea's swagger ("repoCreateStatus").
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "forge-token-of-the-tests"
SHA = r"(?P<sha>[0-9a-f]{40})"
ROUTES = {
    "github": re.compile(rf"/repos/(?P<name>[^/]+/[^/]+)/statuses/{SHA}"),
    "gitlab": re.compile(rf"/api/v4/projects/(?P<name>[^/]+)/statuses/{SHA}"),
    "gitea": re.compile(rf"/api/v1/repos/(?P<name>[^/]+/[^/]+)/statuses/{SHA}"),
}
AUTHORIZATION = {
    "github": ("Authorization", f"Bearer {TOKEN}"),
    "gitlab": ("PRIVATE-TOKEN", TOKEN),
    "gitea": ("Authorization", f"token {TOKEN}"),
}
STATES = {
    "github": {"error", "failure", "pending", "success"},
    "gitlab": {"pending", "running", "success", "failed", "canceled", "skipped"},
    "gitea": {"pending", "success", "error", "failure", "warning"},
}


class FakeForge:
    """One of the three. `trouble`: answers to give before the right one: (code, headers), or seconds to sleep."""

    def __init__(self, kind: str, repository: str = "acme/digits") -> None:
        self.kind, self.repository = kind, repository
        self.said: list[dict[str, Any]] = []
        self.asked = 0
        self.trouble: list[tuple[int, dict[str, str]] | float] = []
        self.always: tuple[int, dict[str, str]] | None = None
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def words(self) -> list[tuple[str, str]]:
        return [(s["state"], s["description"]) for s in self.said]

    def start(self) -> None:
        forge = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None: ...

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                forge.asked += 1
                trouble = forge.always or (forge.trouble.pop(0) if forge.trouble else None)
                if isinstance(trouble, float):
                    time.sleep(trouble)
                    trouble = None
                code, headers, answer = (*trouble, {"message": "no"}) if trouble else forge._take(self, body)
                text = json.dumps(answer).encode()
                with contextlib.suppress(ConnectionError):  # who asked did not wait for a slow answer
                    self.send_response(code)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _take(self, request: BaseHTTPRequestHandler, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        found = ROUTES[self.kind].fullmatch(request.path)
        wanted = self.repository.replace("/", "%2F") if self.kind == "gitlab" else self.repository
        header, value = AUTHORIZATION[self.kind]
        if request.headers.get(header) != value:
            return 401, {}, {"message": "Bad credentials"}
        if found is None or found["name"] != wanted:
            return 404, {}, {"message": "Not Found"}
        if self.kind == "github" and not request.headers.get("User-Agent"):
            return 403, {}, {"message": "Request forbidden by administrative rules"}
        long = len(body.get("description", "")) > (140 if self.kind == "github" else 255)
        if body["state"] not in STATES[self.kind] or long or not body.get("context"):
            return (400 if self.kind == "gitlab" else 422), {}, {"message": "Validation Failed"}
        last = next((s for s in reversed(self.said) if s["sha"] == found["sha"]), None)
        if self.kind == "gitlab" and last and last["state"] == body["state"] in ("pending", "running"):
            return 400, {}, {"message": f"Cannot transition status via :enqueue from :{body['state']} (Reason(s): ...)"}
        self.said.append({**body, "sha": found["sha"]})
        return 201, {}, {"id": len(self.said), "state": body["state"]}


@contextmanager
def fake_forge(kind: str) -> Iterator[FakeForge]:
    forge = FakeForge(kind)
    forge.start()
    try:
        yield forge
    finally:
        forge.stop()
