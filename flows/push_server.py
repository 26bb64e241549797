"""The HTTP server under the receiver: uvicorn, with an end for whoever never ends a request.

uvicorn waits for the head of a request as long as it takes, so a few hundred silent connections would keep every forge
out. Here a head has HEAD_SECONDS, and where connections run out, the one that has waited longest for its head makes
room. A body that was refused is read on for as long, so that its sender hears why. Not covered: bodies that are slow or
large (flows.push_receiver), TLS and rates (the proxy's).
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deployments.errors import ConfigError

HEAD_SECONDS = 10.0
CONNECTIONS = 500
SPARE = 10  # connections that are made room for before uvicorn answers 503
END_SECONDS = 20  # for requests under way when it is told to end; a pod is given 30


class Impatient(H11Protocol):
    """A connection that is cut when the head of a request does not come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > CONNECTIONS - SPARE:
            waiting = [c for c in self.connections if isinstance(c, Impatient) and c is not self and not c.busy()]
            if waiting:
                min(waiting, key=lambda c: c.since).give_up()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.busy():
            self.limit.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.limit.cancel()
        if not self.busy():
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self.limit.cancel()
        super().connection_lost(exc)

    def busy(self) -> bool:
        """Whether a request is being answered: its time is the app's affair."""
        return self.cycle is not None and not self.cycle.response_complete

    def give_up(self) -> None:
        """Cut it, whatever is still to be sent."""
        self.limit.cancel()
        self.connections.discard(self)
        self.transport.abort()

    def _await_head(self) -> None:
        self.since = self.loop.time()
        self.limit = self.loop.call_later(HEAD_SECONDS, self.give_up)


def make_server(app: Any) -> uvicorn.Server:
    """The server of an app; `run(sockets=[...])` serves until SIGTERM, and lets requests under way end first."""
    config = uvicorn.Config(
        app,
        http=Impatient,
        ws="none",
        log_level="error",  # its warnings are what strangers sent: they could fill the log
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=END_SECONDS,
        limit_concurrency=CONNECTIONS,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ConfigError if the port is taken or the host is none of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); expected a free port on an "
            "address of this machine; see who has it: ss -ltnp"
        ) from None
