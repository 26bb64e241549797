"""A forge's status routes on a real socket, as each of the three documents them: paths, authorization, words, answers.

Written from GitHub's REST reference ("Create a commit status"), GitLab's ("Set commit pipeline status", and its refusal
to make the same transition twice) and Gitea's swagger ("repoCreateStatus").
"""

from __future__ import annotations

import re
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.loopback_kit import JsonHandler, LoopbackFake

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


class FakeForge(LoopbackFake):
    """One of the three. `trouble`: answers to give before the right one: (code, headers), or seconds to sleep."""

    def __init__(self, kind: str, repository: str = "acme/digits") -> None:
        super().__init__()
        self.kind, self.repository = kind, repository
        self.said: list[dict[str, Any]] = []
        self.asked = 0
        self.trouble: list[tuple[int, dict[str, str]] | float] = []
        self.always: tuple[int, dict[str, str]] | None = None

    def words(self) -> list[tuple[str, str]]:
        return [(s["state"], s["description"]) for s in self.said]

    def handler(self) -> type[JsonHandler]:
        forge = self

        class Handler(JsonHandler):
            def do_POST(self) -> None:
                body = self.body()
                forge.asked += 1
                trouble = forge.always or (forge.trouble.pop(0) if forge.trouble else None)
                if isinstance(trouble, float):
                    time.sleep(trouble)
                    trouble = None
                code, headers, answer = (*trouble, {"message": "no"}) if trouble else forge._take(self, body)
                self.answer(code, answer, headers)

        return Handler

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
