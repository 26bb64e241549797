"""`reprise serve`: the process that runs what Prefect schedules, and looks after it.

    reprise serve               # in the foreground; `reprise up` keeps it as a service once `reprise deploy` was run

A worker of the process pool starts each flow run as a process of its own. Beside it small loops: one decides pushes
that wait, one says so at the forge, one looks for flows that died (flows.zombies). Killed, it loses nothing: runs go on
without it, late ones start when it is back. Not covered: a cluster, where Prefect's Kubernetes worker starts flows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments.errors import StepError
from deployments.processes import SERVICE_MARK
from deployments.service_launches import Service
from flows.display import say
from flows.laptop_only import laptop_only
from flows.prefect_api import Prefect
from flows.push_handover import Target, drain_forever, open_target
from flows.push_status import report_forever
from flows.services import prefect_environment
from flows.settings import PlaceSettings
from flows.start import Order
from flows.triggers import pool_name
from flows.zombies import sweep
from tasks.records import Store

SWEEP_SECONDS = 5.0
POLL_SECONDS = 2.0  # how soon a scheduled run is noticed
END_SECONDS = 26.0  # for flows that were told to end


def serve(pipeline: str, place: str) -> None:
    """Run until SIGTERM or Ctrl-C. Raises TryAgain if Prefect is not there, ConfigError for a cluster."""
    laptop_only(Order(pipeline=pipeline, place=place), "serve")
    target = open_target(pipeline, place)
    laptop = target.place
    assert isinstance(laptop, PlaceSettings)
    target.prefect.call("GET", "/health")
    # Flows and trainers that are started from here must not be taken for parts of this service.
    os.environ.pop(SERVICE_MARK, None)
    prefect_environment(laptop)
    os.environ["PREFECT_WORKER_QUERY_SECONDS"] = str(POLL_SECONDS)
    stop = threading.Event()
    loops = [
        threading.Thread(target=drain_forever, args=(target, stop.wait, say), daemon=True),
        threading.Thread(target=report_forever, args=(target, stop.wait, say), daemon=True),
        threading.Thread(target=_look_after, args=(target, laptop, stop.wait), daemon=True),
    ]
    for loop in loops:
        loop.start()
    say(f"serving {target.name}: {target.prefect.url}/deployments")
    try:
        asyncio.run(_work(laptop))
    finally:
        stop.set()


async def _work(place: PlaceSettings) -> None:
    """Prefect's worker until somebody ends it; a server that is away for longer than it bears is waited for."""
    from prefect.workers.process import ProcessWorker

    loop, ending = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ending.set)
    working = asyncio.create_task(_keep_working(lambda: ProcessWorker(pool_name(place), name=_worker_name())))
    await ending.wait()
    # First, because a worker that is cancelled kills its flows: told to end, they let their trainers save.
    await asyncio.to_thread(_end_flows)
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working


async def _keep_working(make: Callable[[], Any]) -> None:
    while True:
        try:
            await make().start()
        except Exception as error:
            say(f"the worker ended: {error}; it starts again")
        await asyncio.sleep(SWEEP_SECONDS)


def _worker_name() -> str:
    return f"reprise-{socket.gethostname()}"


def _end_flows() -> None:
    """SIGTERM to each flow that was started from here, and wait until they are gone."""
    import psutil

    flows = [p for p in psutil.Process().children(recursive=True) if "prefect.engine" in _command(p)]
    for process in flows:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(flows, timeout=END_SECONDS)


def _command(process: Any) -> list[str]:
    import psutil

    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _look_after(target: Target, place: PlaceSettings, stopped: Callable[[float], bool]) -> None:
    """Find dead flows until told to stop. Survives whatever goes wrong."""
    store, told = Store(root=str(place.state / "store")), ""
    while not stopped(SWEEP_SECONDS):
        try:
            deployment = target.prefect.deployment(target.name)
            for line in sweep(target.prefect, store, deployment["id"] if deployment else ""):
                say(line)
            told = ""
        except Exception as error:  # a bad look must not end the service
            if str(error) != told:
                told = str(error)
                say(f"looking for dead flows: {told}")


def worker_service(pipeline: Path, place: PlaceSettings) -> Service:
    """`reprise serve` as a service of the laptop."""
    folder = place.state.resolve() / "services" / "worker"
    argv = [sys.executable, "-P", "-m", "flows", "serve", "--pipeline", str(pipeline), "--place", str(place.file)]
    return Service(
        name="worker",
        folder=folder,
        ports={},
        command=lambda: (argv, dict(os.environ), pipeline.parent),
        health=(),
    )


def ensure_worker(pipeline: Path, name: str, place: PlaceSettings, prefect: Prefect) -> bool:
    """Start the worker if the pipeline is registered and none runs; whether one runs now. Raises PreflightError."""
    from deployments.services import start_all

    try:
        if prefect.deployment(name) is None:
            return False
    except StepError:
        return False
    start_all([worker_service(pipeline, place)])
    return True
