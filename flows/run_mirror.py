"""A run's document in Prefect while it happens, for whoever cannot see the cluster's state volume.

    with mirrored(run, flow_run):          # in the flow's pod
        ...
    seen = read_mirror(prefect, flow_run)  # anywhere: {"document": ..., "line": [step, line]} or None

An artifact of the flow run, written when the document changes, at most once a second, and at the end. The document on
the volume is the record: a Prefect that is away costs the view, not the run. Not covered: showing it (flows.submit).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deployments.errors import StepError
from flows.prefect_api import Prefect
from flows.run import Run

KIND, ANSWER = "reprise-run", "reprise-answer"  # the artifacts' types
SECONDS = 1.0


@contextmanager
def mirrored(run: Run, flow_run: str) -> Iterator[None]:
    """Keep the artifact as the document is while the body runs."""
    mirror = _Mirror(run, flow_run)
    told, run.on_event = run.on_event, mirror.on_event
    thread = threading.Thread(target=mirror.run_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        mirror.stop.set()
        thread.join(10.0)
        mirror.write()
        run.on_event = told


def tell(prefect: Prefect, flow_run: str, answer: dict[str, Any]) -> None:
    """Write what a flow that is no run of a pipeline has to say. Raises TryAgain without a server."""
    body = {"type": ANSWER, "data": json.dumps(answer), "flow_run_id": flow_run, "description": "What came of it"}
    prefect.call("POST", "/artifacts/", body)


def told(prefect: Prefect, flow_run: str) -> dict[str, Any]:
    """What such a flow said, {} if nothing."""
    found = _artifact(prefect, flow_run, ANSWER)
    return _data(found) if found else {}


def read_mirror(prefect: Prefect, flow_run: str) -> dict[str, Any] | None:
    """What a flow run last told, None if nothing yet. Raises TryAgain without a server."""
    found = _artifact(prefect, flow_run)
    if found is None:
        return None
    return _data(found)


def _data(artifact: dict[str, Any]) -> dict[str, Any]:
    data = artifact["data"]
    seen: dict[str, Any] = json.loads(data) if isinstance(data, str) else data
    return seen


def _artifact(prefect: Prefect, flow_run: str, kind: str = KIND) -> dict[str, Any] | None:
    wanted = {"flow_run_id": {"any_": [flow_run]}, "type": {"any_": [kind]}}
    found: list[dict[str, Any]] = prefect.call("POST", "/artifacts/filter", {"artifacts": wanted, "limit": 1})
    return found[0] if found else None


class _Mirror:
    def __init__(self, run: Run, flow_run: str) -> None:
        self.run, self.flow_run = run, flow_run
        self.prefect = Prefect(url=run.urls["prefect"], timeout=5.0)
        self.on_before = run.on_event
        self.stop = threading.Event()
        self.line: list[str] = []
        self.written, self.artifact = "", ""

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        """Keeps the last line of a log; the rest is in the document."""
        if kind == "line":
            self.line = [str(fields["step"]), str(fields["line"])[:1000]]
        self.on_before(kind, fields)

    def run_forever(self) -> None:
        """Until told to stop."""
        while not self.stop.wait(SECONDS):
            self.write()

    def write(self) -> None:
        """The artifact as the document is now; what cannot be written now is written later."""
        try:
            text = json.dumps({"document": self.run.document, "line": self.line}, sort_keys=True)
        except RuntimeError:  # changed while we looked
            return
        if text == self.written:
            return
        try:
            if not self.artifact and (found := _artifact(self.prefect, self.flow_run)):
                self.artifact = str(found["id"])
            if self.artifact:
                self.prefect.call("PATCH", f"/artifacts/{self.artifact}", {"data": text})
            else:
                body = {"type": KIND, "data": text, "flow_run_id": self.flow_run, "description": "The run's document"}
                self.artifact = str(self.prefect.call("POST", "/artifacts/", body)["id"])
        except StepError:
            return
        self.written = text
