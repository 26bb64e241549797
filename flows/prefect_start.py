"""A run that Prefect starts by itself: from the schedule, the form, a push, a retry or an approval.

The same flow run may come more than once: killed and resumed, retried in the UI, continued after an approval. It goes
on with the run it began, at that run's commit, whatever its branch points to by now. It waits for its turn without
holding up Prefect's heartbeats. Not covered: runs of the command (flows.execute).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

from deployments.errors import TryAgain
from flows.fetch import fetch_revision
from flows.form import TrainingForm, overrides_of
from flows.project import Project
from flows.run import FINISHED, Run, read_run
from flows.services import ensure_services, restore_endpoints
from flows.start import Order, begin, prepare, prepared_run, where
from tasks.records import Store

POLL_SECONDS = 0.5


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
    file, place, store = where(order)
    async with AsyncExitStack() as held:
        await _turn(held, store, flow_lock(flow_run), seconds=60.0)
        document = run_of(store, flow_run)
        if document is None:
            await asyncio.to_thread(fetch_revision, Project(file.parent), order.rev)
            order = replace(order, overrides=(*overrides_of(form, prepare(order).pipeline), *order.overrides))
        else:
            order = _again(order, document)
        prepared = prepare(order)
        await _turn(held, store, f"pipeline-{prepared.pipeline.name}", seconds=prepared.pipeline.train.deadline)
        await asyncio.to_thread(ensure_services, place)
        await asyncio.to_thread(restore_endpoints, place, store)
        with begin(prepared, prepared.plan()) as run:
            remember_flow_run(run, flow_run)
            yield run


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
        resume="" if document["status"] in FINISHED else document["run"],
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
