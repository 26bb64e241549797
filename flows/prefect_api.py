"""Prefect's public REST API for what must be quick: registering, handing a run over, reading and setting states.

Importing Prefect costs seconds; the receiver of a push and the hook that waits at the end of a `git push` have none.
Standard library only. Raises TryAgain for a server that is away or in trouble, GiveUp for what it refuses.
Not covered: running flows (flows.retrain, flows.serve).
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from deployments.errors import GiveUp, TryAgain

FLOW = "retrain"
BUSY_PAUSES = (0.3, 0.6, 1.2, 2.4)  # seconds; SQLite lets one writer in at a time


class Busy(TryAgain):
    """The server is there and its database is locked: nothing was done."""


@dataclass(frozen=True, kw_only=True)
class Prefect:
    """One server. `url` is its root (http://127.0.0.1:14200), `timeout` in seconds for one request."""

    url: str
    timeout: float = 10.0

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One request; returns the decoded answer, None for an empty one. A busy database (503) is asked again."""
        for pause in BUSY_PAUSES:
            try:
                return self._once(method, path, body)
            except Busy:
                time.sleep(pause)
        return self._once(method, path, body)

    def _once(self, method: str, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if auth := os.environ.get("PREFECT_API_AUTH_STRING"):
            headers["Authorization"] = "Basic " + base64.b64encode(auth.encode()).decode()
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/api{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            passing = TryAgain if error.code >= 500 or error.code in (408, 425, 429) else GiveUp
            kind = Busy if error.code == 503 else passing
            raise kind(f"Prefect at {self.url} answered {error.code} to {method} {path}: {said}") from None
        except (OSError, http.client.HTTPException) as error:
            raise TryAgain(f"Prefect at {self.url} does not answer: {error}; start it: reprise up") from None
        return json.loads(text) if text.strip() else None

    def find(self, path: str) -> dict[str, Any] | None:
        """GET one object; None if the server has none of that name."""
        try:
            found: dict[str, Any] = self.call("GET", path)
        except GiveUp as error:
            if " answered 404 " in str(error):
                return None
            raise
        return found

    def deployment(self, pipeline: str) -> dict[str, Any] | None:
        """The deployment of a pipeline, None if it is not registered."""
        return self.find(f"/deployments/name/{FLOW}/{pipeline}")

    def start(
        self, deployment: str, *, parameters: dict[str, Any], name: str, tags: list[str], idempotency_key: str
    ) -> dict[str, Any]:
        """Ask for a run of a deployment (its id). The same key gives the same run, however often it is asked."""
        body = {"parameters": parameters, "name": name, "tags": tags, "idempotency_key": idempotency_key}
        body["state"] = {"type": "SCHEDULED", "name": "Scheduled", "message": name}
        run: dict[str, Any] = self.call("POST", f"/deployments/{deployment}/create_flow_run", body)
        return run

    def run(self, flow_run: str) -> dict[str, Any] | None:
        """A flow run by its id, None if there is none."""
        return self.find(f"/flow_runs/{flow_run}")

    def runs(self, *, states: list[str], deployment: str = "", tags: list[str] | None = None) -> list[dict[str, Any]]:
        """Flow runs of `retrain` in these state types (of one deployment, with all these tags), newest first."""
        wanted: dict[str, Any] = {"state": {"type": {"any_": states}}}
        if tags:
            wanted["tags"] = {"all_": tags}
        body: dict[str, Any] = {
            "flow_runs": wanted,
            "flows": {"name": {"any_": [FLOW]}},
            "sort": "EXPECTED_START_TIME_DESC",
            "limit": 200,
        }
        if deployment:
            body["deployments"] = {"id": {"any_": [deployment]}}
        found: list[dict[str, Any]] = self.call("POST", "/flow_runs/filter", body)
        return found

    def set_state(self, flow_run: str, kind: str, name: str, message: str, *, force: bool = False) -> bool:
        """Move a flow run to a state; whether the server accepted it."""
        body = {"state": {"type": kind, "name": name, "message": message}, "force": force}
        answer = self.call("POST", f"/flow_runs/{flow_run}/set_state", body)
        return bool(answer["status"] == "ACCEPT")
