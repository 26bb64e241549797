"""One MLflow run through all attempts, over MLflow's public REST API with the standard library.

Importing mlflow costs seconds, and a trainer pays them at every restart. `find_or_create_run` makes or adopts the run
that carries the step key; `MetricLog` sends metrics from a thread. After a resume it asks the server for the last step
that it has: the replayed tail is not sent twice, and what the dead attempt had not sent comes from the checkpoint.
A server that is away delays metrics and never stops a training.
Not covered: artifacts, models, the registry (tasks.register_model). Credentials: MLFLOW_TRACKING_TOKEN, or
MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, as mlflow itself reads them.
"""

from __future__ import annotations

import base64
import json
import math
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

STEP_KEY = "reprise.step_key"  # the tag that makes the run findable
BATCH = 1000  # metrics in one request, MLflow's limit
TAIL = 10_000  # unsent steps kept in a checkpoint at most
TIMEOUT = 10.0  # seconds for one request
Entry = tuple[int, int, dict[str, float]]  # step, unix milliseconds, metrics


class TrackingUnavailable(ConnectionError):
    """The server cannot be reached or is failing: the same request may succeed later."""


class TrackingRefused(ValueError):
    """The server understood and said no."""


class ChangedParameters(ValueError):
    """The run exists with other parameters: it would not be one training any more."""


def find_or_create_run(
    uri: str, experiment: str, key: str, name: str, tags: Mapping[str, str], params: Mapping[str, Any]
) -> str:
    """The id of the run with that step key, made if there is none. Call under the step's lock: the search and the
    creation are two requests. Of several (made without the lock) the oldest is taken. One that had failed or was
    cancelled is running again.

    Raises ChangedParameters naming old and new values, TrackingUnavailable, TrackingRefused.
    """
    where = _experiment(uri, experiment)
    found = _ask(
        uri,
        "runs/search",
        {
            "experiment_ids": [where],
            "filter": f"tags.`{STEP_KEY}` = '{key}'",
            "max_results": 1,
            "order_by": ["attributes.start_time ASC"],
        },
    ).get("runs", [])
    wanted = {k: str(v) for k, v in params.items()}
    if found:
        run = found[0]
    else:
        all_tags = [{"key": k, "value": v} for k, v in {**tags, STEP_KEY: key}.items()]
        body = {"experiment_id": where, "run_name": name, "start_time": _now(), "tags": all_tags}
        run = _ask(uri, "runs/create", body)["run"]
    run_id: str = run["info"]["run_id"]
    old = {p["key"]: p["value"] for p in run["data"].get("params", [])}
    if changed := [k for k, v in wanted.items() if k in old and old[k] != v]:
        told = ", ".join(f"{k} was {old[k]!r} and is now {wanted[k]!r}" for k in sorted(changed))
        raise ChangedParameters(
            f"MLflow run {run_id} of step {key[:12]}: {told}. A training keeps its parameters through all attempts: "
            f"put the old values back, or start another training (another step key)"
        )
    missing = [{"key": k, "value": v} for k, v in wanted.items() if k not in old]
    for first in range(0, len(missing), 100):
        _ask(uri, "runs/log-batch", {"run_id": run_id, "params": missing[first : first + 100]})
    if run["info"].get("status") in ("FAILED", "KILLED"):
        _ask(uri, "runs/update", {"run_id": run_id, "status": "RUNNING"})
    return run_id


def end_run(uri: str, run: str, status: str = "FINISHED") -> None:
    """Close the run. Status: FINISHED, FAILED or KILLED. Raises TrackingUnavailable, TrackingRefused."""
    _ask(uri, "runs/update", {"run_id": run, "status": status, "end_time": _now()})


def set_tags(uri: str, run: str, tags: Mapping[str, str]) -> None:
    """Put tags on the run, replacing those of the same name. Raises TrackingUnavailable, TrackingRefused."""
    _ask(uri, "runs/log-batch", {"run_id": run, "tags": [{"key": k, "value": v} for k, v in tags.items()]})


def set_version_tag(uri: str, model: str, version: str, key: str, value: str) -> None:
    """Put a tag on a registered model version. Raises TrackingUnavailable, TrackingRefused."""
    _ask(uri, "model-versions/set-tag", {"name": model, "version": version, "key": key, "value": value})


def last_steps(uri: str, run: str) -> dict[str, int]:
    """The last step that the server has of each metric: its high-water marks."""
    query = urllib.parse.urlencode({"run_id": run})
    metrics = _ask(uri, f"runs/get?{query}")["run"]["data"].get("metrics", [])
    return {m["key"]: int(m.get("step", 0)) for m in metrics}


class MetricLog:
    """Sends metrics in the background, in order, each step once over all attempts."""

    def __init__(
        self,
        uri: str,
        run: str,
        *,
        tail: Iterable[Any] = (),
        problem: Callable[[str], None] = lambda message: None,
        pause: float = 1.0,
    ) -> None:
        """`tail`: what `unsent` gave when the checkpoint was made. `problem` is told once per outage, from the thread.
        `pause`: seconds between batches, and the first wait after a failure."""
        self._uri, self._run, self._problem, self._pause = uri, run, problem, pause
        self._queue: deque[Entry] = deque((int(s), int(t), dict(m)) for s, t, m in tail)
        self._lock = threading.Lock()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="metrics", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics of one step. Steps that the server has already are left out later."""
        with self._lock:
            self._queue.append((step, _now(), dict(metrics)))

    def unsent(self) -> list[Entry]:
        """What the server has not acknowledged, for the checkpoint: the newest TAIL steps."""
        with self._lock:
            return list(self._queue)[-TAIL:]

    def close(self, timeout: float) -> int:
        """Send what is left, for at most `timeout` seconds; returns how many steps could not be sent."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)
        with self._lock:
            return len(self._queue)

    def _send_all(self) -> None:
        marks: dict[str, int] | None = None
        wait, away = self._pause, False
        while True:
            try:
                if marks is None:
                    marks = last_steps(self._uri, self._run)
                while self._send_batch(marks):
                    pass
                wait, away = self._pause, False
                if self._closing.is_set():
                    return
            except TrackingUnavailable as error:
                if not away:
                    self._problem(f"metrics wait: {error}")
                wait, away = min(wait * 2, 30.0) if away else self._pause, True
                if self._closing.is_set():  # a last chance needs a wait that close() cannot cut short
                    time.sleep(min(wait, 0.5))
            except TrackingRefused as error:
                self._problem(f"metrics are not logged any more: {error}")
                return
            self._wake.wait(wait)

    def _send_batch(self, marks: dict[str, int]) -> bool:
        """Send one request's worth of whole steps; False when there is nothing left."""
        metrics: list[dict[str, Any]] = []
        count = 0
        with self._lock:
            for step, at, values in self._queue:
                if len(metrics) + len(values) > BATCH:
                    break
                count += 1
                metrics += [
                    {"key": key, "value": _number(value), "timestamp": at, "step": step}
                    for key, value in values.items()
                    if step > marks.get(key, -1)
                ]
        if metrics:
            _ask(self._uri, "runs/log-batch", {"run_id": self._run, "metrics": metrics})
        marks.update({m["key"]: m["step"] for m in metrics})
        with self._lock:
            for _ in range(count):
                self._queue.popleft()
        return count > 0


def _experiment(uri: str, name: str) -> str:
    query = urllib.parse.urlencode({"experiment_name": name})
    for _ in range(2):
        try:
            found = _ask(uri, f"experiments/get-by-name?{query}")
            return str(found["experiment"]["experiment_id"])
        except TrackingRefused as error:
            if "RESOURCE_DOES_NOT_EXIST" not in str(error):
                raise
        try:
            return str(_ask(uri, "experiments/create", {"name": name})["experiment_id"])
        except TrackingRefused as error:
            if "RESOURCE_ALREADY_EXISTS" not in str(error):  # somebody else was quicker
                raise
    raise TrackingRefused(f"MLflow at {uri}: experiment {name!r} neither exists nor can be made (was it deleted?)")


def _ask(uri: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One request: GET, or POST with a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{uri.rstrip('/')}/api/2.0/mlflow/{path}", data=data, headers=_headers())
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            answer: dict[str, Any] = json.loads(response.read() or b"{}")
            return answer
    except urllib.error.HTTPError as error:
        told = error.read().decode(errors="replace")[:500]
        message = f"MLflow at {uri}: {path.split('?')[0]} answered {error.code}: {told}"
        kind = TrackingUnavailable if error.code >= 500 or error.code in (408, 429) else TrackingRefused
        raise kind(message) from error
    except (OSError, json.JSONDecodeError) as error:  # refused, timed out, not resolved, or not MLflow
        raise TrackingUnavailable(f"MLflow at {uri}: {error}") from error


def _headers() -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    elif user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        pair = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return headers


def _number(value: float) -> float | str:
    """A float as MLflow's JSON wants it: NaN and infinities are strings there."""
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def _now() -> int:
    return int(time.time() * 1000)
