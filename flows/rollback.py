"""An earlier version back in service: the same transaction as a deployment, in another order.

    reprise rollback              # the version that served before
    reprise rollback --to 3       # a given MLflow version

Alias, default version and .mar digest move together (tasks.deploy_model); Prefect keeps the record of who served when.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from deployments.errors import GiveUp
from flows.place import is_cluster
from flows.services import ensure_services, prefect_environment, service_urls
from flows.settings import load_pipeline
from flows.start import Order, pipeline_file, where
from tasks.deploy_model import RollbackRequest, roll_back


def rollback(order: Order, to: str) -> dict[str, Any]:
    """Move the endpoint back; returns {"pipeline", "version", "url", ...}. Raises GiveUp if there is nothing."""
    if is_cluster(order.place, pipeline_file(order).parent):
        return _on_cluster(order, to)
    file, place, store = where(order)
    pipeline = load_pipeline(file)
    endpoint = store.read(f"endpoints/{pipeline.name}")
    if not endpoint or not endpoint.get("serving"):
        raise GiveUp(
            f"{pipeline.name}: nothing is in service, so there is nothing to roll back; start with: reprise run"
        )
    urls = service_urls(place)
    ensure_services(place)
    request = RollbackRequest(
        pipeline=pipeline.name,
        to=to,
        management_url=urls["management"],
        inference_url=urls["inference"],
        tracking_uri=urls["mlflow"],
        record=str(store.path / "endpoints"),
        soak_seconds=pipeline.serve.soak,
    )
    prefect_environment(place)
    answer = asyncio.run(_flow(request, endpoint["serving"]["version"]))
    return {"pipeline": pipeline.name, "was": endpoint["serving"]["version"], **answer}


def _on_cluster(order: Order, to: str) -> dict[str, Any]:
    """A flow there does it (flows.rollback_flow); followed until it ends."""
    from flows.ask import ask_for_rollback

    return ask_for_rollback(order, to)


async def _flow(request: RollbackRequest, before: str) -> dict[str, Any]:
    from prefect import flow, task

    @task(name="deploy_model", task_run_name="deploy_model")
    async def deploy() -> dict[str, Any]:
        return asdict(await asyncio.to_thread(roll_back, request))

    @flow(name="rollback", flow_run_name=f"{request.pipeline} back from version {before}", persist_result=False)
    async def rollback_flow() -> dict[str, Any]:
        return await deploy()

    return await rollback_flow()
