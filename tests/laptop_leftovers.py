"""What a laptop project may have left behind: ports that answer, processes that work in its folder."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def taken(port: int) -> bool:
    """Whether somebody listens there, on loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that work in the folder or were started for it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if entry.name != str(os.getpid()) and (
                str(folder) in line or os.readlink(entry / "cwd").startswith(str(folder))
            ):
                found.append(line)
        except OSError:
            continue
    return found
