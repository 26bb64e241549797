"""Whole process trees on one machine: start them detached, know them again, end them without leaving a rest.

A pid alone names nobody: it is used again. An `Identity` is the pid with the kernel's own start mark, so it stays true
after a crash of ours, a reboot or a step of the clock. A tree is more than parent links: torchrun gives each worker a
session of its own and a killed parent hands its children to init, so what we start carries a mark in its environment,
which its descendants inherit. Used by laptop.py (jobs) and services.py (servers).
Not covered: processes of other users, and programs that wipe their environment after a double fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

JOB_MARK = "REPRISE_JOB_FOLDER"  # P/.reprise/jobs/<workload>, in the environment of every process of a job
SERVICE_MARK = "REPRISE_SERVICE_FOLDER"  # P/.reprise/services/<name>, in that of every process of a server
MARKS = (JOB_MARK, SERVICE_MARK)
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def start_mark(pid: int) -> str:
    """What tells this process from a later one with the same pid; empty if it is gone or a zombie."""
    if sys.platform == "linux":
        try:
            # The name, in brackets, may hold spaces and brackets: count fields behind the last one.
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            boot = _BOOT.read_text()[:8] if _BOOT.exists() else ""
        except (OSError, IndexError):
            return ""
        return "" if len(fields) < 20 or fields[0] in (b"Z", b"X") else f"{boot}:{int(fields[19])}"
    import psutil

    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return ""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One process, for good: its pid and its start mark."""

    pid: int
    start: str

    @classmethod
    def of(cls, pid: int) -> Identity:
        """The process that has this pid now; one that is gone is an identity that is not alive."""
        return cls(pid=pid, start=start_mark(pid))

    def alive(self) -> bool:
        """It runs still. A child of ours that has ended is collected, so that it does not stay a zombie."""
        if not self.start:
            return False
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        return start_mark(self.pid) == self.start


def spawn(argv: Sequence[str], *, env: Mapping[str, str], log: Path) -> Identity:
    """Start a program that outlives us: own session, no terminal, output appended to `log`. Raises OSError.

    posix_spawn instead of subprocess, because nobody holds a handle: whoever comes later finds it by its identity.
    """
    pid = os.posix_spawnp(
        argv[0],
        list(argv),
        dict(env),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigmask=[],
        # What Python or a nohup above us ignores must not be ignored in there.
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT],
    )
    return Identity.of(pid)


def remember(path: Path, identity: Identity, **more: Any) -> None:
    """Write down who it is, and more, in one rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(asdict(identity) | more, indent=1, sort_keys=True))
    aside.replace(path)


def recall(path: Path) -> tuple[Identity, dict[str, Any]] | None:
    """Who it was, and the whole record; None if nothing (readable) was written down."""
    try:
        record = json.loads(path.read_text())
        return Identity(pid=record["pid"], start=record["start"]), record
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _look() -> dict[int, tuple[int, dict[str, str]]]:
    """pid -> (parent, our marks in its environment), for every living process but ourselves."""
    import psutil

    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                parent, own = process.ppid(), {}
                with contextlib.suppress(psutil.AccessDenied):
                    own = {name: value for name, value in process.environ().items() if name in MARKS}
                found[process.pid] = parent, own
    return found


def marks(variable: str) -> dict[int, str]:
    """pid -> value, for every living process but ourselves that has this one of MARKS in its environment."""
    return {pid: own[variable] for pid, (_, own) in _look().items() if variable in own}


def parent(pid: int) -> int:
    """The pid of its parent; 0 if it is gone."""
    import psutil

    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return 0


def children(pid: int) -> list[int]:
    """Its direct children that live."""
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children() if start_mark(child.pid)]
    except psutil.Error:
        return []


def tree(variable: str, value: str, roots: Iterable[int] = ()) -> set[int]:
    """Every process with the mark, the given roots, and all their descendants; never ourselves.

    A descendant that has another mark belongs to somebody else (a server that was started from within a job).
    """
    found = _look()
    offspring: dict[int, list[int]] = {}
    for pid, (parent, own) in found.items():
        if not own or own.get(variable) == value:
            offspring.setdefault(parent, []).append(pid)
    ahead = [pid for pid, (_, own) in found.items() if own.get(variable) == value] + [r for r in roots if r in found]
    whole: set[int] = set()
    while ahead:
        pid = ahead.pop()
        if pid not in whole:
            whole.add(pid)
            ahead += offspring.get(pid, [])
    return whole


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Signal each that is there still."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def kill_tree(variable: str, value: str, *, roots: Iterable[int] = (), spare: Iterable[int] = ()) -> set[int]:
    """SIGKILL the tree until nothing of it is left, for 5 s at most. Returns the pids that were there.

    In rounds, since what is killed may just have started something. `spare` is left alone (a job's supervisor, which
    then tells the exit code).
    """
    killed: set[int] = set()
    roots, kept = list(roots), set(spare)
    until = time.monotonic() + 5
    while (left := tree(variable, value, roots) - kept) and time.monotonic() < until:
        # A tree's own order does not matter to SIGKILL, but parents first leave no one to restart a worker.
        send(sorted(left), signal.SIGKILL)
        killed |= left
        gone = time.monotonic() + 0.5
        while any(Identity.of(pid).alive() for pid in left) and time.monotonic() < gone:
            time.sleep(0.005)
    return killed
