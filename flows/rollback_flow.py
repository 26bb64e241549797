"""`reprise rollback --place cluster`, inside: a flow of one step in a pod of the cluster's work pool.

It needs neither the project nor its remote, so that it works when those are the trouble. Not covered: asking for it
(flows.rollback), the transaction (tasks.deploy_model).
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task

from deployments.errors import GiveUp
from deployments.workload import Workload
from flows.place import Place, open_place
from flows.prefect_api import Prefect
from flows.program import judge
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

    @task(name="roll_back", task_run_name="roll_back")
    async def step() -> dict[str, Any]:
        return await asyncio.to_thread(_run, here, request, flow_run)

    endpoint = await step()
    answer = {"pipeline": name, "was": serving["version"], **endpoint}
    tell(Prefect(url=here.urls["prefect"]), flow_run, answer)
    return answer


def _run(here: Place, request: RollbackRequest, flow_run: str) -> dict[str, Any]:
    """The step's program, named after the flow run: a flow that comes again adopts it."""
    workload = Workload(
        name=f"roll-back-{flow_run[:23]}",
        image="step",
        command=("python", "-m", "tasks.step", "roll_back", "{request}", "{result}"),
        request=asdict(request),
        resources=here.wanted("deploy_model"),
        account="deploy",
        labels={"pipeline": request.pipeline, "step": "roll_back"},
    )
    answer: dict[str, Any] = judge(here.runner().run(workload), "roll_back")["result"]
    return answer
