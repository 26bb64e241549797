"""The servers of the laptop place: Prefect, MLflow and TorchServe on loopback, started once and left running.

`ensure(state, ports={...})` starts what does not run yet, in parallel, and returns the URLs; `status(state)` and
`down(state)` need only the state folder (P/.reprise). A server's folder is `services/<name>/`; its process.json names
the process for good (pid and start mark). It is ready when its real API answers.
Asking for servers that run costs milliseconds: nothing heavy is imported for that.
Not covered: how each is started (service_launches.py), what is registered in them, and restarting one that dies later,
which the next `ensure` does.
"""

from __future__ import annotations

import contextlib
import fcntl
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deployments import ports as tcp
from deployments import processes
from deployments.errors import PreflightError
from deployments.ports import HOST
from deployments.processes import JOB_MARK
from deployments.processes import SERVICE_MARK as MARK
from deployments.service_launches import NAMES, Service, laptop_services

START_SECONDS = 180.0  # on a busy machine Prefect's first start takes its time: it makes its database
STOP_SECONDS = 8.0  # from SIGTERM to SIGKILL
REPLACE_SECONDS = 3.0  # the same, for the rest of a server that is about to be started again
State = Literal["starting", "ready", "reused", "stopping", "stopped"]
OnProgress = Callable[[str, State, float], None]  # name, state, seconds since we were asked


@dataclass(frozen=True, kw_only=True)
class ServiceStatus:
    """One server as it is now."""

    name: str
    state: Literal["running", "not answering", "stopped"]
    pid: int | None
    ports: dict[str, int]  # name under [ports] -> TCP port
    started: float | None  # unix seconds
    memory_bytes: int  # resident, of all its processes
    log: str


def ensure(
    state: Path,
    *,
    ports: Mapping[str, int],
    on_progress: OnProgress | None = None,
    python: str = sys.executable,
    timeout_seconds: float = START_SECONDS,
) -> dict[str, str]:
    """Start what does not run yet, all at once, and wait until everything answers. Returns name -> URL.

    The names are prefect, mlflow, inference, management, metrics. Several callers at once: one starts, the others wait.
    Raises PreflightError for a port that somebody else holds (before anything is started), and for a server that dies
    or does not answer in time. Whatever is raised, servers that started well stay, and the next call takes them over.
    """
    start_all(laptop_services(state, ports, python), on_progress=on_progress, timeout_seconds=timeout_seconds)
    return {name: f"http://{HOST}:{ports[name]}" for name in NAMES}


def start_all(
    services: Sequence[Service], *, on_progress: OnProgress | None = None, timeout_seconds: float = START_SECONDS
) -> None:
    """`ensure` for any servers whose folders stand side by side."""
    began = time.monotonic()

    def tell(service: Service, state: State) -> None:
        if on_progress:
            on_progress(service.name, state, time.monotonic() - began)

    def tell_all() -> None:
        for service in services:
            tell(service, "starting")

    if all(_runs_as_wanted(service) and _answers(service.health) for service in services):
        for service in services:
            tell(service, "reused")
        return
    with _lock(services[0].folder.parent, tell_all):
        new = [service for service in services if not _runs_as_wanted(service)]
        # The rest of one that died, or one on yesterday's ports.
        _stop([service.folder for service in new], grace_seconds=REPLACE_SECONDS)
        for service in new:
            _check_ports(service)
        for service in new:
            _start(service)
        waiting = list(services)
        while waiting:
            for service in list(waiting):
                alive = _runs_as_wanted(service)
                if alive and _answers(service.health):
                    waiting.remove(service)
                    tell(service, "ready" if service in new else "reused")
                elif alive and time.monotonic() - began < timeout_seconds:
                    tell(service, "starting")
                else:
                    raise PreflightError(_why_not_up(service, alive, time.monotonic() - began))
            if waiting:
                time.sleep(0.05)


def status(state: Path) -> list[ServiceStatus]:
    """Every server that was ever started in this state folder, by name."""
    found = []
    for folder in _folders(state):
        known = processes.recall(folder / "process.json")
        identity, record = known if known and known[0].alive() else (None, known[1] if known else {})
        answers = identity is not None and _answers(record["health"])
        found.append(
            ServiceStatus(
                name=folder.name,
                state="running" if answers else "not answering" if identity else "stopped",
                pid=identity.pid if identity else None,
                ports=record.get("ports", {}),
                started=record["started"] if identity else None,
                memory_bytes=_memory(folder) if identity else 0,
                log=str(folder / "log.txt"),
            )
        )
    return found


def down(
    state: Path,
    *,
    only: Sequence[str] = (),
    on_progress: OnProgress | None = None,
    grace_seconds: float = STOP_SECONDS,
) -> list[str]:
    """Stop everything of this state folder, or `only` some, and wait until its ports are free. Returns what ran.

    Raises PreflightError if a port stays taken: then somebody has it whom we did not start.
    """
    if not (state / "services").is_dir():
        return []
    with _lock(state.resolve() / "services", lambda: None):
        folders = [folder for folder in _folders(state) if not only or folder.name in only]
        return _stop(folders, on_progress=on_progress, grace_seconds=grace_seconds)


def _start(service: Service) -> None:
    """Start it detached. Raises PreflightError if its program is missing."""
    service.folder.mkdir(parents=True, exist_ok=True)
    argv, env, cwd = service.command()
    log = service.folder / "log.txt"
    if log.exists():
        log.replace(service.folder / "log.1.txt")
    # Started from within a job, it must not be killed with it.
    env = {name: value for name, value in env.items() if name not in ("REPRISE_JOB", JOB_MARK)}
    shell = ["/bin/sh", "-c", 'cd "$1" && shift && exec "$@"', "reprise-service", str(cwd), *argv]
    identity = processes.spawn(shell, env=env | {MARK: str(service.folder)}, log=log)
    more: dict[str, Any] = {"ports": dict(service.ports), "health": list(service.health), "started": time.time()}
    processes.remember(service.folder / "process.json", identity, **more)


def _stop(
    folders: Sequence[Path], *, on_progress: OnProgress | None = None, grace_seconds: float = STOP_SECONDS
) -> list[str]:
    """SIGTERM, the grace, SIGKILL for what is left of them, until their ports are free; returns the names that ran."""
    began, marked = time.monotonic(), processes.marks(MARK)

    def tell(folder: Path, state: State) -> None:
        if on_progress:
            on_progress(folder.name, state, time.monotonic() - began)

    running = {folder: [pid for pid, found in marked.items() if found == str(folder)] for folder in folders}
    for folder, pids in running.items():
        if pids:
            tell(folder, "stopping")
            # Every process of it is asked, because not every parent passes the word on: TorchServe's leaves its JVM.
            processes.send(pids, signal.SIGTERM)
    while time.monotonic() - began < grace_seconds and any(
        processes.Identity.of(pid).alive() for pids in running.values() for pid in pids
    ):
        time.sleep(0.02)
    ran: list[str] = []
    held: list[tuple[str, str, int]] = []
    for folder, pids in running.items():
        known = processes.recall(folder / "process.json")
        roots = {known[0].pid} if known and known[0].alive() else set()
        if processes.kill_tree(MARK, str(folder), roots=roots) or pids:
            ran.append(folder.name)
            held += [(folder.name, name, port) for name, port in (known[1]["ports"] if known else {}).items()]
            tell(folder, "stopped")
        (folder / "process.json").unlink(missing_ok=True)
    until = time.monotonic() + 5
    for name, setting, port in held:
        while not tcp.free(port):
            if time.monotonic() > until:
                raise PreflightError(f"{name} is stopped, but its {setting} port {port} is held by {tcp.holder(port)}")
            time.sleep(0.02)
    return ran


def _runs_as_wanted(service: Service) -> bool:
    """The process that was started for it lives, and on these ports."""
    known = processes.recall(service.folder / "process.json")
    return known is not None and known[1].get("ports") == dict(service.ports) and known[0].alive()


def _why_not_up(service: Service, alive: bool, seconds: float) -> str:
    log = service.folder / "log.txt"
    lines = log.read_text(errors="replace").splitlines()[-15:] if log.exists() else []
    what = f"does not answer after {seconds:.0f} s (`reprise down` ends it)" if alive else "ended while it was starting"
    return "\n".join([f"{service.name} {what}; the end of {log}:", *(f"  | {line}" for line in lines or ["(empty)"])])


def _check_ports(service: Service) -> None:
    for setting, port in service.ports.items():
        if not tcp.free(port):
            raise PreflightError(
                f"port {port} for {service.name} is taken by {tcp.holder(port)}; end it, or choose another port "
                f"in laptop.toml beside pipeline.toml: [ports] {setting} = {tcp.next_free(port)}"
            )


def _answers(health: Sequence[str]) -> bool:
    """Every one of these (port/path) answers 200."""
    from http.client import HTTPConnection, HTTPException

    for address in health:
        port, _, path = address.partition("/")
        connection = HTTPConnection(HOST, int(port), timeout=5)
        try:
            connection.request("GET", f"/{path}")
            if connection.getresponse().status != 200:
                return False
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()
    return True


def _folders(state: Path) -> list[Path]:
    parent = state.resolve() / "services"
    return sorted(folder for folder in parent.iterdir() if folder.is_dir()) if parent.is_dir() else []


def _memory(folder: Path) -> int:
    import psutil

    total = 0
    for pid in processes.tree(MARK, str(folder)):
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss
    return total


@contextlib.contextmanager
def _lock(folder: Path, while_waiting: Callable[[], None]) -> Iterator[None]:
    """One caller at a time; freed by the death of its holder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                while_waiting()
                time.sleep(0.1)
        yield
