"""What a flow run shows of itself in Prefect: each thing once, and renewed in its place.

A flow run comes more than once: retried, resumed, continued after an approval. Prefect would keep what it showed each
time as a card of its own, so that a person sees three plans and does not know which one holds. Keys begin with the
pipeline's name: Prefect takes equal keys for versions of one thing. A copy for readers: a server that is away costs the
view, not the run. Not covered: what is shown (flows.publish, flows.training_progress).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal

from deployments.errors import StepError
from flows.prefect_api import Prefect
from flows.run import Run

Kind = Literal["markdown", "progress"]


async def show(run: Run, name: str, kind: Kind, data: str | float, description: str) -> None:
    """Show `data` as `<pipeline>-<name>` on the page of the run's flow run."""
    await asyncio.to_thread(show_now, run, name, kind, data, description)


def show_now(run: Run, name: str, kind: Kind, data: str | float, description: str, *, timeout: float = 10.0) -> None:
    """The same for whoever cannot await; `timeout` in seconds for each of two requests."""
    if flow_run := run.document["links"].get("prefect_flow_run"):
        key = f"{run.plan.pipeline.name}-{name}"
        put(Prefect(url=run.urls["prefect"], timeout=timeout), flow_run, key, kind, data, description)


def put(prefect: Prefect, flow_run: str, key: str, kind: Kind, data: str | float, description: str) -> None:
    """The artifact `key` of a flow run, made or renewed; what a server does not take is told in this process's log."""
    shown: dict[str, Any] = {"data": data, "description": description}
    try:
        mine = {"flow_run_id": {"any_": [flow_run]}, "key": {"any_": [key]}}
        found = prefect.call("POST", "/artifacts/filter", {"artifacts": mine, "limit": 1})
        if found:
            prefect.call("PATCH", f"/artifacts/{found[0]['id']}", shown)
        else:
            prefect.call("POST", "/artifacts/", {**shown, "key": key, "type": kind, "flow_run_id": flow_run})
    except StepError as error:
        logging.getLogger(__name__).warning("%s is not shown: %s", key, error)
