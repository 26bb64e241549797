"""One Kubernetes API server over HTTP: JSON in and out, authentication by the `kubernetes` client, patience.

The client's typed models are left aside: they drop fields they do not know, and a PyTorchJob has none. An API server
that restarts (connection refused, 429, 5xx) is waited for; a refusal becomes one sentence that says which rule or
definition is missing. Not covered: where it is (kube_connect.py), what is asked (cluster.py, kube_watch.py).
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deployments.errors import GiveUp, PreflightError, Unreachable

PATIENCE = 300.0  # seconds that an API server may be away
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
MERGE_PATCH, APPLY_PATCH = "application/merge-patch+json", "application/apply-patch+yaml"
INSTALL_OPERATOR = (
    'kubectl apply --server-side -k "github.com/kubeflow/training-operator/manifests/overlays/standalone?ref=v1.9.3"'
)
Json = dict[str, Any]
_FORBIDDEN = re.compile(
    r'cannot (?P<verb>\w+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"'
    r'(?: in the namespace "(?P<namespace>[^"]+)")?'
)


class ApiStatus(Exception):
    """An answer that the caller has to understand: 400, 404, 409, 410, 422."""

    def __init__(self, code: int, reason: str, message: str, *, resent: bool = False) -> None:
        """`resent`: an earlier sending of the same request may have taken effect without an answer."""
        super().__init__(f"{code} {reason}: {message}")
        self.code, self.reason, self.message, self.resent = code, reason, message, resent


class KubeApi:
    """Requests to one API server. Safe for many threads."""

    def __init__(self, client: Any, *, patience: float = PATIENCE) -> None:
        """`client`: a kubernetes.client.ApiClient; see kube_connect.py. `patience`: seconds the server may be away."""
        self.client, self.patience = client, patience
        self.host = str(client.configuration.host).rstrip("/")
        self.calls: Counter[str] = Counter()  # by verb: what this process costs the API server
        self._counting = threading.Lock()

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        patience: float | None = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> Json:
        """One JSON request, tried again while the server is away, for `patience` seconds.

        Raises ApiStatus for 400, 404, 409, 410, 422; PreflightError for 401, 403 and a definition that is missing;
        Unreachable when patience is spent. `on_wait` hears once why it waits.
        """
        until = time.monotonic() + (self.patience if patience is None else patience)
        delay, resent = 0.2, False
        while True:
            after: float | None = None
            try:
                status, headers, data = self._once(method, path, query, body, content_type)
            except OSError as error:
                why, resent = _in_words(error), method != "GET"
            else:
                if status < 400:
                    return json.loads(data) if data.strip() else {}
                document = _document(data)
                if status != 429 and status < 500:
                    raise _refusal(status, document, method, path, resent=resent)
                why = f"{status} {document['message']}"
                after = _seconds(headers.get("Retry-After"))
                resent = resent or (method != "GET" and status >= 500)
            pause = (after if after is not None else delay) * random.uniform(0.8, 1.2)
            if time.monotonic() + pause > until:
                raise Unreachable(
                    f"the Kubernetes API at {self.host} does not answer: {method} {path}: {why}; "
                    "look whether the API server is up and reachable from here"
                )
            if on_wait:
                on_wait(why)
                on_wait = None
            time.sleep(pause)
            delay = min(10.0, delay * 2)

    def get(self, path: str, **query: str) -> Json:
        """GET with the default patience; see `request`."""
        return self.request("GET", path, query=query)

    def find(self, path: str) -> Json | None:
        """GET, None for 404. Raises as `request`."""
        try:
            return self.get(path)
        except ApiStatus as status:
            if status.code != 404:
                raise
            return None

    def delete(self, path: str, *, propagation: str = "Foreground", grace: int | None = None, uid: str = "") -> None:
        """DELETE; no error if it is gone, or if the uid given is another object's by now."""
        body: Json = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": propagation}
        if grace is not None:
            body["gracePeriodSeconds"] = grace
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            self.request("DELETE", path, body=body)
        except ApiStatus as status:
            if status.code not in (404, 409):
                raise

    def stream(self, path: str, query: Mapping[str, str], *, quiet_seconds: float) -> Lines:
        """Lines of an answer that goes on (a watch, a log), until the server ends it.

        Raises ApiStatus and PreflightError as `request`, OSError when the connection is cut or silent for
        `quiet_seconds`, Unreachable for 429 and 5xx.
        """
        response = self._open("GET", path, query, None, "", (CONNECT_SECONDS, quiet_seconds))
        if response.status >= 400:
            document = _document(response.read(decode_content=True))
            response.release_conn()
            if response.status == 429 or response.status >= 500:
                raise Unreachable(f"GET {path}: {response.status} {document['message']}")
            raise _refusal(response.status, document, "GET", path)
        return Lines(response)

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def _once(
        self, method: str, path: str, query: Mapping[str, str] | None, body: Any, content_type: str
    ) -> tuple[int, Mapping[str, str], bytes]:
        data = None if body is None else json.dumps(body).encode()
        response = self._open(method, path, query, data, content_type, (CONNECT_SECONDS, READ_SECONDS))
        with _as_os_error():
            content = response.read(decode_content=True)
        response.release_conn()
        return response.status, response.headers, content

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        data: bytes | None,
        content_type: str,
        timeout: tuple[float, float],
    ) -> Any:
        import urllib3

        with self._counting:
            self.calls[("WATCH" if query and query.get("watch") else method)] += 1
        headers: dict[str, str] = {"Accept": "application/json", "User-Agent": "reprise"}
        if data is not None:
            headers["Content-Type"] = content_type
        # Renews the token where it is short-lived (in a pod, exec plugins).
        self.client.update_params_for_auth(headers, [], ["BearerToken"], path, method, None)
        url = self.host + path + ("?" + urllib.parse.urlencode(query) if query else "")
        with _as_os_error():
            return self.client.rest_client.pool_manager.request(
                method,
                url,
                body=data,
                headers=headers,
                timeout=urllib3.Timeout(connect=timeout[0], read=timeout[1]),
                retries=False,
                preload_content=False,
            )


class Lines:
    """An open answer, line by line; `close` from another thread ends the iteration."""

    def __init__(self, response: Any) -> None:
        """`response`: an open urllib3 response."""
        self._response, self._closed = response, False

    def __iter__(self) -> Iterator[bytes]:
        rest = b""
        try:
            with _as_os_error():
                while chunk := self._response.read1(1 << 16):
                    *lines, rest = (rest + chunk).split(b"\n")
                    yield from lines
        except (OSError, ValueError, AttributeError):
            if not self._closed:
                raise
            return
        finally:
            self._response.close()
        if rest:
            yield rest

    def close(self) -> None:
        """End it, also while another thread waits for the next line."""
        import contextlib
        import socket

        self._closed = True
        connection = getattr(self._response, "_connection", None) or getattr(self._response, "connection", None)
        sock = getattr(connection, "sock", None)
        with contextlib.suppress(OSError):
            if sock is not None:
                sock.shutdown(socket.SHUT_RDWR)


class _as_os_error:
    """urllib3's errors of a connection as OSError, so that callers need not know the library."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, OSError):
            return
        from urllib3.exceptions import HTTPError

        if isinstance(error, HTTPError):
            raise OSError(f"{type(error).__name__}: {error}") from error


def _document(data: bytes) -> Json:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        value = {"message": " ".join(data.decode(errors="replace").split())[:300]}
    return {"reason": "", "message": "", **value}


def _refusal(status: int, document: Json, method: str, path: str, *, resent: bool = False) -> Exception:
    message = str(document["message"])
    if status == 401:
        return PreflightError(
            f"the Kubernetes API refused our credentials ({message}); renew the token or certificate of the "
            "kubeconfig, or look at the service account of this pod"
        )
    if status == 403 and (rule := _FORBIDDEN.search(message)):
        wanted = {"apiGroups": [rule["group"]], "resources": [rule["resource"]], "verbs": [rule["verb"]]}
        kind = "Role" if rule["namespace"] else "ClusterRole"
        return PreflightError(f"the Kubernetes API forbids it: {message}; add to its {kind}: {json.dumps(wanted)}")
    if status == 403:
        return GiveUp(f"the Kubernetes API refused it by admission or quota: {message}")
    if status == 404 and "/kubeflow.org/" in path and not document.get("details", {}).get("name"):
        return PreflightError(
            "this cluster has no PyTorchJob (pytorchjobs.kubeflow.org/v1): install the Kubeflow Training Operator: "
            f"{INSTALL_OPERATOR}"
        )
    return ApiStatus(status, str(document["reason"]), message, resent=resent)


def _in_words(error: OSError) -> str:
    """urllib3 tells of its own objects first: what remains is what happened."""
    text = re.sub(r"\bHTTPS?Connection(?:Pool)?\([^)]*\): ", "", str(error))
    return re.sub(r"^(?:\w+Error: )?(?:Failed to establish a new connection: )?(?:\[Errno -?\d+\] )?", "", text)


def _seconds(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
