"""The whole pipeline on one screen: plan, pull, train, register, package, deploy, check.

    reprise run                      # from the project folder
    python -m flows run --rev main   # the same

A step that is already done for these inputs is reused; a killed flow goes on where it was when it is started again.
Not covered: what a step does (tasks), where it runs (deployments), who starts the flow (flows.__main__, a schedule).
"""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows import requests
from flows.approval import approved
from flows.form import Cause, Overrides, Rev, TrainingForm
from flows.plain_errors import plain_errors
from flows.prefect_start import current_run
from flows.publish import curve, published
from flows.result_page import headline
from flows.start import Order, run_name
from flows.steps import run_step
from flows.versions import champion_on, remember_version
from tasks.check_endpoint import check_endpoint
from tasks.deploy_model import deploy_model
from tasks.package_model import package_model
from tasks.pull_data import pull_data
from tasks.register_model import register_model
from tasks.train_model import train_model

plain_errors()


@flow(name="retrain", flow_run_name=run_name, persist_result=False)
async def retrain(
    rev: Rev = "HEAD",
    train: TrainingForm | None = None,
    overrides: Overrides | None = None,
    cause: Cause = "form",
    pipeline: str = "",
    place: str = "laptop",
) -> State[None]:
    """One run of one pipeline; ends in a state that says what came of it. Raises what its first failing step raised."""
    order = Order(pipeline=pipeline, rev=rev, overrides=tuple(overrides or ()), place=place, cause=cause)
    async with current_run(order, train) as run, published(run):
        data = await run_step(run, pull_data, requests.pull(run))
        training = await run_step(run, train_model, requests.train(run, data))
        await curve(run, training)
        champion = await champion_on(run, data)
        model = await run_step(run, register_model, requests.register(run, data, training, champion))
        remember_version(run, data, training, model)
        archive = await run_step(run, package_model, requests.package(run, model, training))
        await approved(run, model)
        endpoint = await run_step(run, deploy_model, requests.deploy(run, model, archive, training))
        await run_step(run, check_endpoint, requests.check(run, endpoint, training))
    return Completed(message=headline(run.document))
