"""A run that Prefect starts by itself: from the schedule, the form, a push, a retry or an approval.

The same flow run may come more than once: killed and resumed, retried in the UI, continued after an approval. It goes
on with the run it began, at that run's commit, whatever its branch points to by now. It waits for its turn without
holding up Prefect's heartbeats. Not covered: runs of the command (flows.execute).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from deployments.errors import TryAgain
from flows.form import TrainingForm, defaults_of, overrides_of
from flows.place import CLUSTER_VARIABLE, Place, open_place
from flows.prefect_api import Prefect
from flows.run import FINISHED, Run, read_run
from flows.run_mirror import mirrored
from flows.start import Order, begin, pipeline_file, prepare, prepared_run
from tasks.records import Store

POLL_SECONDS = 0.5
DEAD_SECONDS = 120.0  # for the lock of a process that is gone with its node: network volumes let go late


def flow_lock(flow_run: str) -> str:
    """The lock that the process of a flow run holds."""
    return f"flow-{flow_run}"


def run_of(store: Store, flow_run: str) -> dict[str, Any] | None:
    """The document of the run that a flow run began, None if it did not come that far."""
    began = store.read(f"flow-runs/{flow_run}")
    if began is None or store.read(f"runs/{began['run']}") is None:
        return None
    return read_run(store, began["run"])


@asynccontextmanager
async def current_run(order: Order, form: TrainingForm | None = None) -> AsyncIterator[Run]:
    """The run that the command has begun; when Prefect started the flow, the one that it began before, or a new one."""
    if (run := prepared_run.get()) is not None:
        yield run
        return
    from prefect import runtime

    flow_run = str(runtime.flow_run.id)
    in_pod = CLUSTER_VARIABLE in os.environ
    place, pipeline = _opened(order, in_pod=in_pod)
    store = place.store
    async with AsyncExitStack() as held:
        if in_pod:  # the locks are on its volume
            place.ensure()
        await _turn(held, store, flow_lock(flow_run), seconds=DEAD_SECONDS)
        document = run_of(store, flow_run)
        if document is not None:
            order = _again(order, document)
        file, rev = await asyncio.to_thread(place.bring, pipeline, order.rev)
        order = replace(order, pipeline=str(file), rev=rev)
        if document is None and form is not None:
            shown = await asyncio.to_thread(_shown, place, str(runtime.deployment.id or ""))
            changed = overrides_of(form, prepare(order, place).pipeline, shown=shown)
            order = replace(order, overrides=(*changed, *order.overrides))
        prepared = prepare(order, place)
        await _turn(held, store, f"pipeline-{prepared.pipeline.name}", seconds=prepared.pipeline.train.deadline)
        await asyncio.to_thread(place.ensure)
        await asyncio.to_thread(place.restore)
        with begin(prepared, prepared.plan()) as run:
            remember_flow_run(run, flow_run)
            with mirrored(run, flow_run) if in_pod else contextlib.nullcontext():
                yield run


def _shown(place: Place, deployment: str) -> dict[str, Any]:
    """What the form of a deployment says by itself. Raises TryAgain without a server."""
    found = Prefect(url=place.urls["prefect"]).find(f"/deployments/{deployment}") if deployment else None
    return defaults_of((found or {}).get("parameter_openapi_schema") or {})


def _opened(order: Order, *, in_pod: bool) -> tuple[Place, str]:
    """The place of a flow, and its pipeline file as `Place.bring` takes it: in a pod it is not here yet."""
    if in_pod:
        return open_place(order.place, Path()), order.pipeline or "pipeline.toml"
    file = pipeline_file(order)
    return open_place(order.place, file.parent), str(file)


def remember_flow_run(run: Run, flow_run: str) -> None:
    """Which run a flow run began: whoever starts it again, or finds it dead, finds the run."""
    run.store.write(f"flow-runs/{flow_run}", {"run": run.id})


def _again(order: Order, document: dict[str, Any]) -> Order:
    """The order that a flow run had when it came first."""
    return replace(
        order,
        rev=document["git_sha"],
        overrides=tuple(document["overrides"]),
        cause=document["cause"],
        resume="" if document["status"] in FINISHED and document.get("closed", True) else document["run"],
    )


async def _turn(held: AsyncExitStack, store: Store, lock: str, *, seconds: float) -> None:
    """Take a lock, waiting as a coroutine does. Raises TryAgain when it is not free in time."""
    give_up = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            held.enter_context(store.lock(lock))
            return
        except TryAgain:
            if asyncio.get_running_loop().time() > give_up:
                raise
        await asyncio.sleep(POLL_SECONDS)
