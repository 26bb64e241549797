"""Faults of a real Kubernetes API for tests: a server that stops, hangs or dies, and a wire to it that is cut."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from tests.cluster_kit import rig_state


def _server() -> dict[str, int]:
    record: dict[str, int] = json.loads((rig_state() / "pids" / "kube-apiserver.json").read_text())
    return record


@contextlib.contextmanager
def hanging_api_server() -> Iterator[None]:
    """It holds its connections and answers nothing, until the block ends. Needs a rig."""
    pid = _server()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def dead_api_server() -> Iterator[None]:
    """It is killed, and started again with the same arguments when the block ends. Needs a rig."""
    state, pid = rig_state(), _server()["pid"]
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    os.kill(pid, signal.SIGKILL)
    try:
        yield
    finally:
        with (state / "logs" / "kube-apiserver.log").open("ab") as log:
            outputs = [(os.POSIX_SPAWN_DUP2, log.fileno(), number) for number in (1, 2)]
            again = os.posix_spawn(command[0], command, os.environ, file_actions=outputs, setsid=True)
        started = Path(f"/proc/{again}/stat").read_text().rpartition(")")[2].split()[19]
        record = {"pid": again, "start": int(started)}  # as the rig's own, which ends it
        (state / "pids" / "kube-apiserver.json").write_text(json.dumps(record))


class Wire:
    """A TCP relay to the API server that can be cut: `kubeconfig` leads through it."""

    def __init__(self, folder: Path) -> None:
        """Listens at once. `folder`: for the kubeconfig."""
        import yaml

        document = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
        cluster = document["clusters"][0]["cluster"]
        url = urllib.parse.urlsplit(cluster["server"])
        self._far = (str(url.hostname), url.port or 443)
        self._listening = socket.create_server(("127.0.0.1", 0))
        cluster["server"] = f"https://127.0.0.1:{self._listening.getsockname()[1]}"
        cluster["tls-server-name"] = url.hostname
        self.kubeconfig = folder / "wire.kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(document))
        self.refusing, self.cuts = False, 0
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End every connection, without a word (RST)."""
        with self._lock:
            ending, self._open = self._open, []
        self.cuts += len(ending)
        for end in ending:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self) -> None:
        """Listen no more."""
        self.refusing = True
        self._listening.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            if self.refusing:
                near.close()
                continue
            try:
                far = socket.create_connection(self._far)
            except OSError:
                near.close()
                continue
            with self._lock:
                self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._relay, args=(source, sink), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                end.close()
        with self._lock:
            self._open = [s for s in self._open if s not in (source, sink)]


def wait_between_cuts(wire: Wire, seconds: float, pause: float) -> None:
    """Cut the wire every `pause` seconds for so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(pause)
        wire.cut()
