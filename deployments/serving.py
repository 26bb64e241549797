"""The few things a rollout needs of a model server, and TorchServe's way of doing them.

`ModelServer` is all that tasks may use, so that another server (TorchServe is in limited maintenance) is one more class
here. Versions are named by label. `TorchServe` speaks its management and inference API by the standard library alone.
Not covered: starting a server (torchserve_launch.py), in which order a rollout happens (tasks.deploy_model).
Measured traps that this file encodes: registering is synchronous by default and then stalls traffic; READY means
loaded, not right; the default version cannot be removed beside others; deleting loses what is queued, so drain first.
An absolute folder registers whatever `allowed_urls` says: the management port must never be reachable from a network.
"""

from __future__ import annotations

import json
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from deployments.errors import GiveUp, TryAgain


@dataclass(frozen=True, kw_only=True)
class Served:
    """One version that a server holds."""

    label: str
    mar: str  # file name in the model store
    default: bool
    workers: int  # wanted
    ready: int  # loaded; says nothing about right answers
    pids: tuple[int, ...]  # of the workers that have one
    pending: int  # requests in the queue; the batch inside a worker is not counted
    response_timeout: int  # seconds


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back for one request."""

    status: int
    body: bytes
    headers: Mapping[str, str]  # lower-case names
    seconds: float

    def document(self) -> dict[str, Any]:
        """The body as JSON object; {} if it is none."""
        try:
            value = json.loads(self.body)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


class ModelServer(Protocol):
    """A server that holds versions of models and sends unpinned requests to the default one."""

    def register(self, model: str, mar: str, *, workers: int, batch: tuple[int, int] | None = None) -> None:
        """Begin to load a .mar of the store; returns at once. `batch`: another (size, delay in ms) than the .mar's.

        Raises GiveUp if it is refused.
        """

    def versions(self, model: str) -> list[Served]:
        """All versions held; empty if the model is not known. Raises TryAgain if the server is away."""

    def predict(self, model: str, body: bytes, *, label: str = "", timeout: float = 30.0) -> Answer:
        """Ask one version, or the default one. Raises TryAgain if no answer came."""

    def set_default(self, model: str, label: str) -> None:
        """Send unpinned requests to this version from now on."""

    def unregister(self, model: str, label: str) -> None:
        """Remove a version; no error if it is not there. Raises GiveUp for the default version beside others."""


class TorchServe:
    """TorchServe 0.12 over HTTP. Tokens are needed only where its authorization is on."""

    def __init__(
        self, management_url: str, inference_url: str, *, management_token: str = "", inference_token: str = ""
    ):
        self.management_url = management_url.rstrip("/")
        self.inference_url = inference_url.rstrip("/")
        self._management_token = management_token
        self._inference_token = inference_token

    def register(self, model: str, mar: str, *, workers: int, batch: tuple[int, int] | None = None) -> None:
        query: dict[str, Any] = {"url": mar, "model_name": model, "initial_workers": workers, "synchronous": "false"}
        if batch is not None:
            query |= {"batch_size": batch[0], "max_batch_delay": batch[1]}
        # Unpacking is not asynchronous: 2.3 GB took 15 s here.
        answer = self._manage("POST", f"/models?{urllib.parse.urlencode(query)}", timeout=900)
        if answer.status not in (200, 202):
            raise GiveUp(f"TorchServe refused {mar} ({answer.status}): {message(answer)}")

    def versions(self, model: str) -> list[Served]:
        everything = self._manage("GET", f"/models/{quote(model)}/all")
        if everything.status == 404:
            return []
        default = self._manage("GET", f"/models/{quote(model)}")
        if everything.status != 200 or default.status not in (200, 404):
            raise TryAgain(f"{self.management_url}: cannot describe {model}: {message(everything)} {message(default)}")
        # Between the two calls the default may move; a rollout is alone under its lock, so only readers can see that.
        label = json.loads(default.body)[0]["modelVersion"] if default.status == 200 else ""
        return [served(row, default=row["modelVersion"] == label) for row in json.loads(everything.body)]

    def predict(self, model: str, body: bytes, *, label: str = "", timeout: float = 30.0) -> Answer:
        path = f"/predictions/{quote(model)}" + (f"/{quote(label)}" if label else "")
        return call("POST", self.inference_url + path, body, token=self._inference_token, timeout=timeout)

    def set_default(self, model: str, label: str) -> None:
        answer = self._manage("PUT", f"/models/{quote(model)}/{quote(label)}/set-default")
        if answer.status != 200:
            raise GiveUp(f"TorchServe did not make {model} {label} the default ({answer.status}): {message(answer)}")

    def unregister(self, model: str, label: str) -> None:
        answer = self._manage("DELETE", f"/models/{quote(model)}/{quote(label)}", timeout=90)
        if answer.status not in (200, 202, 404):
            raise GiveUp(f"TorchServe did not remove {model} {label} ({answer.status}): {message(answer)}")

    def scale(self, model: str, workers: int) -> None:
        """Another number of workers for the default version; begins at once and does not wait."""
        query = f"min_worker={workers}&max_worker={workers}&synchronous=false"
        answer = self._manage("PUT", f"/models/{quote(model)}?{query}")
        if answer.status not in (200, 202):
            raise GiveUp(f"TorchServe did not scale {model} ({answer.status}): {message(answer)}")

    def models(self) -> list[str]:
        """Names of all models held."""
        answer = self._manage("GET", "/models?limit=1000")
        return sorted(row["modelName"] for row in json.loads(answer.body)["models"])

    def wait_until_up(self, seconds: float) -> None:
        """Return once the management API answers. Raises TryAgain after `seconds`."""
        give_up = time.monotonic() + seconds
        while True:
            try:
                self._manage("GET", "/models?limit=1", timeout=2)
                return
            except TryAgain:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.1)

    def _manage(self, method: str, path: str, timeout: float = 30.0) -> Answer:
        return call(method, self.management_url + path, None, token=self._management_token, timeout=timeout)


def call(
    method: str,
    url: str,
    body: bytes | None,
    *,
    token: str = "",
    timeout: float = 30.0,
    content_type: str = "application/octet-stream",
) -> Answer:
    """One HTTP request, by no proxy; any status is an answer. Raises TryAgain if there is none, GiveUp for no URL."""
    import http.client  # here, because it costs every step 30 ms and most steps never ask a server

    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise GiveUp(f"{url!r} is no address; expected http://host:port")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    headers = {"Content-Type": content_type, "Connection": "close"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection = kind(parts.hostname, parts.port, timeout=timeout)
    began = time.monotonic()
    try:
        connection.request(method, url.split(parts.netloc, 1)[1] or "/", body, headers)
        reply = connection.getresponse()
        content = reply.read()
    except TimeoutError as error:
        raise TryAgain(f"{method} {url}: no answer within {timeout:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise TryAgain(f"{method} {url}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()
    lower = {name.lower(): value for name, value in reply.getheaders()}
    return Answer(status=reply.status, body=content, headers=lower, seconds=time.monotonic() - began)


def served(row: Mapping[str, Any], *, default: bool) -> Served:
    """One row of TorchServe's description."""
    workers = row.get("workers") or []
    return Served(
        label=row["modelVersion"],
        mar=row.get("modelUrl") or "",
        default=default,
        workers=int(row.get("minWorkers") or 0),
        ready=sum(worker.get("status") == "READY" for worker in workers),
        pids=tuple(sorted(int(worker["pid"]) for worker in workers if int(worker.get("pid") or 0) > 0)),
        pending=int((row.get("jobQueueStatus") or {}).get("pendingRequests") or 0),
        response_timeout=int(row.get("responseTimeout") or 120),
    )


def message(answer: Answer) -> str:
    """The reason in an error answer of TorchServe, in one line."""
    text = answer.document().get("message") or answer.document().get("error") or answer.body.decode(errors="replace")
    return " ".join(str(text).split())[:500]


def quote(part: str) -> str:
    """A name as one path segment."""
    return urllib.parse.quote(part, safe="")
