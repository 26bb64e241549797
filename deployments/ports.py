"""TCP ports of this machine's loopback: is one free, and who has it.

Not covered: ports of other addresses, UDP; keeping a port free until it is used (nobody can).
"""

from __future__ import annotations

import contextlib
import errno
import socket
from pathlib import Path

from deployments.processes import SERVICE_MARK

HOST = "127.0.0.1"


def free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of one that has just ended linger
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def next_free(port: int) -> int:
    """The first free port after this one; the port itself if there is none."""
    return next((p for p in range(port + 1, min(port + 1000, 65536)) if free(p)), port)


def holder(port: int) -> str:
    """Who listens there, in words for a person, as well as we may know it."""
    import psutil

    try:
        found = psutil.net_connections(kind="tcp")
    except psutil.Error:  # macOS tells only root
        return "a program whose name this system does not tell"
    here = [c for c in found if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port]
    pid = next((c.pid for c in here if c.pid), None)
    if pid is None:
        return "a program of another user"
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        told = f"{process.name()} (pid {pid})"
        with contextlib.suppress(psutil.Error):
            if folder := process.environ().get(SERVICE_MARK):
                project = Path(folder).parents[2]
                return f"{told}, the {Path(folder).name} of another project (`reprise down` in {project} ends it)"
        return told
    return f"pid {pid}"
