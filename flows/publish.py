"""What people see of a run in Prefect: the plan, the training curve, the report and the links; and how the run ended.

Artifacts are copies for readers; the run document is the record. Not covered: the report's page (tasks.write_report).
"""

from __future__ import annotations

import asyncio
import base64
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Crashed

from deployments.errors import GateRefused, StepError
from deployments.workload import Workload
from flows import requests
from flows.artifact import Kind, show, show_now
from flows.curve import curve_svg
from flows.notifications import notify
from flows.plan_page import plan_markdown
from flows.prefect_api import Prefect
from flows.prefect_start import remember_flow_run
from flows.program import run_program
from flows.result_page import headline, result_markdown, training_words
from flows.run import Run
from flows.start import run_title
from flows.training_progress import training_progress
from tasks.attempts import progress_of
from tasks.train_model import TrainedModel

GRACE_SECONDS = 25.0  # Prefect kills a cancelled flow 30 s after it was told


@asynccontextmanager
async def published(run: Run) -> AsyncIterator[None]:
    """Show the plan before the steps and the outcome after them, whatever it is."""
    try:
        await _begin(run)  # inside: whoever cancels that early is told of it too
        async with training_progress(run):
            yield
    except asyncio.CancelledError:
        _stopped(run)
        get_run_logger().info(run.document["message"])
        show_now(run, *_result(run), timeout=2.0)
        raise
    except Exception as error:
        status = "refused" if isinstance(error, GateRefused) else "failed"
        run.update(status=status, ended=time.time(), message=str(error), error=type(error).__name__)
        if "train_model" in run.results:
            await _report(run)
        await show(run, *_result(run))
        await _tell(run)
        run.update(closed=True)
        raise
    finishing = run.document.get("previous", {}).get("status") == "succeeded"  # killed after its last step
    if run.plan.unchanged and not finishing:  # the schedule of a quiet night: its report would be the last one's
        run.update(status="unchanged", ended=time.time(), message="every step is reused")
        fill(run)
    else:
        run.update(status="succeeded", ended=time.time(), message="")
        await _report(run)
    await show(run, *_result(run))
    get_run_logger().info(headline(run.document))
    await _tell(run)
    run.update(closed=True)


def _stopped(run: Run) -> None:
    """Somebody cancelled the run, or its process has to go: the trainer saves, and what comes next is written down."""
    status, way = "cancelled", f"`reprise resume {run.id}` goes on where it was"
    with _told_once():
        try:
            if runtime.deployment.id:  # the command stops its workload itself
                flow_run = Prefect(url=run.urls["prefect"]).run(str(runtime.flow_run.id)) or {}
                cancelled = (flow_run.get("state") or {}).get("type") in ("CANCELLING", "CANCELLED")
                if cancelled:
                    way = f"Retry in Prefect or {way}"
                else:
                    status, way = "interrupted", f"its process was told to end; {way}"
                if run.workload and (cancelled or not run.plan.place.outlives_flow):
                    run.runner.stop(run.workload, grace_seconds=min(run.plan.place.spot.grace, GRACE_SECONDS))
                if not cancelled:
                    run.plan.place.leave(run.runner)
        finally:
            run.update(status=status, ended=time.time(), message=f"{status}; {way}")


@contextmanager
def _told_once() -> Iterator[None]:
    """A second SIGTERM changes nothing: Prefect's handler would raise in the middle of the work, and the run's document
    would say "running" for ever."""
    if threading.current_thread() is not threading.main_thread():  # only there can a signal be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


async def _tell(run: Run) -> None:
    if problem := await notify(run):
        get_run_logger().warning(problem)


async def _begin(run: Run) -> None:
    flow_run = runtime.flow_run.id
    if flow_run:
        remember_flow_run(run, flow_run)
        if runtime.flow_run.name != run_title(run):
            async with get_client() as client:
                await client.update_flow_run(UUID(flow_run), name=run_title(run))
        run.document["links"]["prefect_flow_run"] = flow_run
        run.document["links"]["prefect"] = f"{run.plan.place.pages['prefect']}/runs/flow-run/{flow_run}"
        run.save()
    previous = run.document.get("previous", {}).get("prefect")
    if previous and previous != flow_run:
        await _close_previous(run, previous)
    text = plan_markdown(run.plan, changed=run.document["overrides"])
    await show(run, "plan", "markdown", text, "What runs, what is reused, and why")


async def _close_previous(run: Run, flow_run: str) -> None:
    """A killed flow stays Running in Prefect for ever; say what became of it."""
    async with get_client() as client:
        old = await client.read_flow_run(UUID(flow_run))
        if old.state is not None and not old.state.is_final():
            state: State[None] = Crashed(message=f"Its process died; the run {run.id} goes on in a new flow run.")
            await client.set_flow_run_state(UUID(flow_run), state, force=True)


async def curve(run: Run, training: TrainedModel) -> None:
    """The loss with the interruptions marked."""
    attempts = run.document["attempts"]
    title = f"Loss over {training.steps} steps: {training_words(run.document)}"
    svg = curve_svg(progress_of(training.progress), attempts, title)
    run.document["links"]["mlflow_run"] = _mlflow_run_url(run, training)
    run.save()
    # Not an image artifact: Prefect prints the address of one, here the whole picture in base64, across its page.
    picture = f"![{title}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"
    await show(run, "curve", "markdown", "\n".join([picture, "", *_attempt_rows(attempts)]), title)


def _attempt_rows(attempts: list[dict[str, Any]]) -> list[str]:
    rows = [
        f"| {a['number']} | {a['from_step']} | {a['reached_step']} | {a['cause'] or 'runs'} | {a['steps_lost']} |"
        for a in attempts
    ]
    return ["| attempt | from step | reached | ended by | steps lost |", "|---|---|---|---|---|", *rows]


async def told_so_far(run: Run) -> None:
    """The result's page before the end, for a person who has to decide."""
    fill(run)
    await show(run, *_result(run))


def _result(run: Run) -> tuple[str, Kind, str, str]:
    return "result", "markdown", result_markdown(run.document), headline(run.document)


def _mlflow_run_url(run: Run, training: TrainedModel) -> str:
    return f"{run.plan.place.pages['mlflow']}/#/runs/{training.run_id}"


def _for_people(run: Run, url: str) -> str:
    """An address in MLflow as steps have it, made one that a browser reaches."""
    inside, outside = run.urls["mlflow"], run.plan.place.pages["mlflow"]
    return outside + url.removeprefix(inside) if url.startswith(inside) else url


async def _report(run: Run) -> None:
    """The page about the run: made by a step program, linked from Prefect. Its failure does not fail the run."""
    training: TrainedModel = run.results["train_model"]
    fill(run)
    request = requests.report(run, training)
    # A flow that was killed here adopts it; what a failed run reports is another thing each time.
    which = "done" if run.document["status"] == "succeeded" else str(run.document.get("resumed", 0))
    workload = Workload(
        name=f"write-report-{run.id}-{which}",
        image="step",
        command=("python", "-m", "tasks.step", "write_report", "{request}", "{result}"),
        request=asdict(request),
        resources=run.plan.place.wanted("write_report"),
        labels={"run": run.id, "pipeline": run.plan.pipeline.name, "step": "write_report"},
    )
    try:
        document = await asyncio.to_thread(run_program, run, workload, "write_report")
    except StepError as error:
        run.event("line", step="write_report", line=f"no report: {error}")
        get_run_logger().warning(f"no report: {error}")
    else:
        run.document["links"].update(
            report=document["result"]["html"], report_mlflow=_for_people(run, document["result"]["url"])
        )
        run.document["report_seconds"] = document["seconds"]
    run.save()


def fill(run: Run) -> None:
    """What the steps' results say about the run, into its document."""
    results, links = run.results, run.document["links"]
    if archive := results.get("package_model"):
        run.document["mar_sha256"] = archive.sha256
    if model := results.get("register_model"):
        run.document["model_version"] = model.version
        run.document["gate"] = model.decision
        links["model"] = _for_people(run, model.model_url)
    if endpoint := results.get("deploy_model"):
        run.document["endpoint"] = endpoint.url
        links["endpoint"] = endpoint.url
    if checked := results.get("check_endpoint"):
        run.document["check"] = asdict(checked)
    run.document["metrics"] = results["train_model"].metrics
    run.save()
