"""The whole pipeline on one screen: plan, pull, train, register, package, deploy, check.

    reprise run                      # from the project folder
    python -m flows run --rev main   # the same

A step that is already done for these inputs is reused; a killed flow goes on where it was when it is started again.
Not covered: what a step does (tasks), where it runs (deployments), who starts the flow (flows.__main__, a schedule).
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows import requests
from flows.publish import curve, published
from flows.start import Order, current_run, run_name
from flows.steps import run_step
from flows.versions import champion_on, remember_version
from tasks.check_endpoint import check_endpoint
from tasks.deploy_model import deploy_model
from tasks.package_model import package_model
from tasks.pull_data import pull_data
from tasks.register_model import register_model
from tasks.train_model import train_model


@flow(name="retrain", flow_run_name=run_name, persist_result=False)
async def retrain(
    pipeline: str = "",
    rev: str = "HEAD",
    overrides: list[str] | None = None,
    place: str = "laptop",
    cause: str = "form",
) -> dict[str, Any]:
    """One run of one pipeline; returns its document. Raises what its first failing step raised."""
    order = Order(pipeline=pipeline, rev=rev, overrides=tuple(overrides or ()), place=place, cause=cause)
    with current_run(order) as run:
        async with published(run):
            data = await run_step(run, pull_data, requests.pull(run))
            training = await run_step(run, train_model, requests.train(run, data))
            await curve(run, training)
            champion = await champion_on(run, data)
            model = await run_step(run, register_model, requests.register(run, data, training, champion))
            remember_version(run, data, training, model)
            archive = await run_step(run, package_model, requests.package(run, model, training))
            endpoint = await run_step(run, deploy_model, requests.deploy(run, model, archive, training))
            await run_step(run, check_endpoint, requests.check(run, endpoint, training))
        return run.document
