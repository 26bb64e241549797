"""`reprise rollback --place cluster`, inside: a flow of one step in a pod of the cluster's work pool.

It needs neither the project nor its remote, so that it works when those are the trouble. Not covered: asking for it
(flows.rollback), the transaction (tasks.deploy_model).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task

from deployments.errors import GiveUp
from flows.lone_step import LoneStep
from flows.place import open_place
from flows.prefect_api import Prefect
from flows.run_mirror import tell
from tasks.deploy_model import RollbackRequest


@flow(name="rollback", persist_result=False)
async def rollback_on_cluster(to: str = "", soak: float = 1.0, place: str = "cluster") -> dict[str, Any]:
    """The answer of `reprise rollback`. Raises GiveUp if nothing is in service, or what the step raised."""
    here, flow_run = open_place(place, Path()), str(runtime.flow_run.id)
    name = str(runtime.deployment.name)
    here.ensure()
    serving = (here.store.read(f"endpoints/{name}") or {}).get("serving")
    if not serving:
        raise GiveUp(f"{name}: nothing is in service, so there is nothing to roll back; start with: reprise run")
    request = RollbackRequest(
        pipeline=name,
        to=to,
        tracking_uri=here.urls["mlflow"],
        record=str(here.store.path / "endpoints"),
        soak_seconds=soak,
        cluster=here.target,
    )

    lone = LoneStep(place=here, name="roll_back", flow_run=flow_run)

    @task(name="roll_back", task_run_name="roll_back")
    async def step() -> dict[str, Any]:
        with lone.ending():
            return await asyncio.to_thread(lone.run, request, pipeline=name)

    endpoint = await step()
    answer = {"pipeline": name, "was": serving["version"], **endpoint}
    tell(Prefect(url=here.urls["prefect"]), flow_run, answer)
    return answer
