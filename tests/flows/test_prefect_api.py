"""The small client: what it sends, and which of Prefect's answers mean try again and which mean give up."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import HTTPServer
from typing import Any

import pytest

from deployments.errors import GiveUp, TryAgain
from flows.prefect_api import Prefect
from tests.loopback_kit import JsonHandler, serving


class Server(HTTPServer):
    """Answers what it is told to; a fake."""

    code = 200
    body: bytes = b"{}"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str, dict[str, str], Any]] = []


class Handler(JsonHandler):
    server: Server

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.seen.append((self.command, self.path, dict(self.headers), body))
        self.send_response(self.server.code)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    do_POST = do_GET


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    with serving(made):
        yield made


@pytest.fixture
def prefect(server: Server) -> Prefect:
    return Prefect(url=f"http://127.0.0.1:{server.server_address[1]}", timeout=5)


def test_a_busy_database_is_asked_again(server: Server, prefect: Prefect, monkeypatch: pytest.MonkeyPatch) -> None:
    def pause(seconds: float) -> None:
        server.code = 200 if len(server.seen) == 2 else 503

    monkeypatch.setattr("flows.prefect_api.time.sleep", pause)
    server.code = 503
    assert prefect.call("POST", "/flows/", {}) == {}
    assert len(server.seen) == 3


@pytest.mark.parametrize(("code", "kind"), [(500, TryAgain), (503, TryAgain), (429, TryAgain), (409, GiveUp)])
def test_which_refusals_pass(
    server: Server, prefect: Prefect, code: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.prefect_api.BUSY_PAUSES", (0.0, 0.0))
    server.code, server.body = code, b'{"detail": "train.epochs: 0 is less than the minimum of 1"}'
    with pytest.raises(kind, match=rf"answered {code} to POST /deployments/d1/create_flow_run: .*minimum of 1"):
        prefect.start("d1", parameters={}, name="n", tags=[], idempotency_key="k")


def test_away() -> None:
    with pytest.raises(TryAgain, match=r"does not answer: .*; start it: reprise up"):
        Prefect(url="http://127.0.0.1:1").call("GET", "/health")


def test_nothing_of_that_name(server: Server, prefect: Prefect) -> None:
    server.code = 404
    assert prefect.deployment("digits") is None


def test_what_is_sent(server: Server, prefect: Prefect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:pass")
    server.body = b'{"id": "r1"}'
    prefect.start("d1", parameters={"rev": "x"}, name="n", tags=["t"], idempotency_key="k")
    method, path, headers, body = server.seen[0]
    assert (method, path) == ("POST", "/api/deployments/d1/create_flow_run")
    assert headers["Authorization"] == "Basic " + base64.b64encode(b"admin:pass").decode()
    assert body["idempotency_key"] == "k" and body["parameters"] == {"rev": "x"}
    assert body["state"]["type"] == "SCHEDULED"


def test_a_state_that_is_not_accepted(server: Server, prefect: Prefect) -> None:
    server.body = b'{"status": "REJECT"}'
    assert prefect.set_state("r1", "CANCELLED", "Cancelled", "") is False
