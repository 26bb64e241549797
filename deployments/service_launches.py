"""How each server of the laptop place is started: command, environment, folder, and what shows that it works.

Pure, but for the files that TorchServe wants prepared. Everything a server keeps is in its folder, everything it opens
is on loopback, none sends telemetry. Not covered: starting and stopping (services.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deployments.errors import PreflightError
from deployments.ports import HOST

NAMES = ("prefect", "mlflow", "inference", "management", "metrics")  # the ports with a URL
Launch = tuple[Sequence[str], Mapping[str, str], Path]  # argv, environment, working folder


@dataclass(frozen=True, kw_only=True)
class Service:
    """One server. `folder` keeps its data, log.txt and process.json."""

    name: str
    folder: Path
    ports: Mapping[str, int]  # name under [ports] in laptop.toml -> TCP port
    command: Callable[[], Launch]  # called right before a start, when nothing of it runs
    health: tuple[str, ...]  # "14200/api/health": port and path; each must answer 200


def laptop_services(state: Path, ports: Mapping[str, int], python: str = sys.executable) -> list[Service]:
    """The three servers of a state folder. `ports`: prefect, mlflow, inference, management, metrics, and optionally
    grpc_inference and grpc_management; other names are left alone. Raises PreflightError for a missing one."""
    if missing := [n for n in ("prefect", "mlflow", "inference", "management", "metrics") if n not in ports]:
        raise PreflightError(f"[ports] {missing[0]}: not set; expected a port for each of the servers")
    folder = state.resolve() / "services"
    serving = {n: p for n, p in ports.items() if n in ("inference", "management", "metrics")}
    serving |= {n: p for n, p in ports.items() if n in ("grpc_inference", "grpc_management") and p}
    prefect, mlflow, torchserve = folder / "prefect", folder / "mlflow", folder / "torchserve"
    return [
        Service(
            name="prefect",
            folder=prefect,
            ports={"prefect": ports["prefect"]},
            command=lambda: prefect_launch(prefect, ports["prefect"], python),
            health=(f"{ports['prefect']}/api/health",),
        ),
        Service(
            name="mlflow",
            folder=mlflow,
            ports={"mlflow": ports["mlflow"]},
            command=lambda: mlflow_launch(mlflow, ports["mlflow"], python),
            # Its /health says OK while the database cannot be read.
            health=(f"{ports['mlflow']}/api/2.0/mlflow/experiments/search?max_results=1",),
        ),
        Service(
            name="torchserve",
            folder=torchserve,
            ports=serving,
            command=lambda: torchserve_launch(torchserve, state.resolve() / "store" / "models", serving, python),
            health=(f"{ports['inference']}/ping", f"{ports['management']}/models"),
        ),
    ]


def prefect_launch(folder: Path, port: int, python: str = sys.executable) -> Launch:
    """A Prefect server with everything it keeps in `folder`, without telemetry."""
    own = {
        "PREFECT_HOME": str(folder),
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder}/prefect.db",
        "PREFECT_UI_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    argv = [python, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    # In its own folder, because Prefect reads prefect.toml, pyproject.toml and .env where it is started.
    return argv, _environment() | own, folder


def mlflow_launch(folder: Path, port: int, python: str = sys.executable) -> Launch:
    """An MLflow server with its database and artifacts in `folder`."""
    own = {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        # Eight processes for jobs (evaluations by a language model and such) that nobody here asks for.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    argv = [python, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    argv += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    argv += ["--artifacts-destination", f"{folder}/artifacts", "--serve-artifacts"]
    return argv, _environment() | own, folder


def torchserve_launch(folder: Path, models: Path, ports: Mapping[str, int], python: str = sys.executable) -> Launch:
    """A TorchServe that comes up with what the endpoints' records beside the model store have in service."""
    from deployments.torchserve_launch import TorchServePorts, champions, torchserve_command

    served = champions(models.parent / "endpoints")
    argv, env, cwd = torchserve_command(folder, models, TorchServePorts(**ports), models=served, python=python)
    return argv, env, cwd


def _environment() -> dict[str, str]:
    """Ours, less what would configure a server behind our back."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "_MLFLOW_"))
    }
