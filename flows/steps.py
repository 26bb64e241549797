"""A task function becomes a Prefect task on a runner: reuse by step key, retries by error type, readable states.

    result = await run_step(run, pull_data, PullRequest(...))

A step that is done already ends in the Prefect state `Reused` with the reason; a failed one in `Failed` with the
error's sentence. An error that says try again is tried again with back-off, one that says give up is not. The step
itself is a program of its own on the runner (tasks.step); only train_model is driven from here. Not covered: the order
of steps (flows.retrain).
"""

from __future__ import annotations

import asyncio
import time
import typing
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import Completed

from deployments.errors import TryAgain
from flows.program import run_program, step_workload
from flows.run import Run
from flows.tail import following
from tasks.records import Attempt
from tasks.step import from_json
from tasks.train_model import TrainedModel, TrainRequest, train_model

Result = TypeVar("Result")
RETRY_DELAYS = [1.0, 5.0, 20.0]  # seconds; a service that restarts is back within them


async def run_step(run: Run, step: Callable[..., Result], request: Any) -> Result:
    """Run one step, or reuse it. Raises what the step raised: TryAgain once its retries are spent, or GiveUp."""
    name = step.__name__
    planned = run.plan.steps[name]
    kind = typing.get_type_hints(step)["return"]
    answer: list[dict[str, Any]] = []  # beside Prefect, which would store it
    failure: list[Exception] = []  # of the last try: Prefect's question below gets a state, not the error

    @task(
        name=name,
        task_run_name=name,
        cache_policy=NO_CACHE,  # the step record is the cache: Prefect's own would call a killed effect undone
        persist_result=False,
        retries=len(RETRY_DELAYS),
        retry_delay_seconds=RETRY_DELAYS,
        retry_condition_fn=lambda task, task_run, state: bool(failure) and isinstance(failure[-1], TryAgain),
        tags=["reused"] if planned.reused else [],
    )
    async def prefect_task() -> Any:
        if planned.record is not None:
            run.step_changed(name, status="reused", reused=True, reason=planned.reason)
            answer.append(planned.record.result)
            return Completed(name="Reused", message=planned.reason)
        began = time.time()
        run.step_changed(name, status="running", started=began, ended=None)
        try:
            result, seconds = await asyncio.to_thread(_execute, run, name, request)
        except asyncio.CancelledError:
            run.step_changed(name, status="cancelled", ended=time.time())
            raise
        except Exception as error:
            failure.append(error)
            run.step_changed(name, status="failed", ended=time.time(), message=str(error))
            raise
        run.finish_step(name, result, seconds)
        run.step_changed(name, status="done", ended=time.time(), seconds=round(seconds, 3))
        answer.append(result)
        return Completed(message=f"took {seconds:.1f} s")

    await prefect_task()
    result = typing.cast("Result", from_json(kind, answer[-1], where=name))
    run.results[name] = result
    return result


def _execute(run: Run, name: str, request: Any) -> tuple[dict[str, Any], float]:
    """The step's work, in a thread: returns its result as JSON and its own seconds."""
    if name == "train_model":
        return _drive_training(run, request)
    document = run_program(run, step_workload(run, name, request), name)
    return document["result"], float(document["seconds"])


def _drive_training(run: Run, request: TrainRequest) -> tuple[dict[str, Any], float]:
    began, logger = time.time(), get_run_logger()

    def on_attempts(attempts: list[Attempt]) -> None:
        run.attempts_changed(attempts)
        if not attempts:  # the first one was refused before it began
            run.workload = ""
            return
        last = attempts[-1]
        run.workload = f"train-{request.spec.key[:12]}-{last.number}" if last.ended is None else ""
        if last.ended is None:
            logger.info(f"attempt {last.number} starts, from step {last.from_step}")
        else:
            lost = max(0, last.reached_step - last.to_step)
            logger.info(f"attempt {last.number} ended at step {last.reached_step}: {last.reason}; {lost} steps lost")

    def on_line(line: str) -> None:
        run.event("line", step="train_model", line=line)

    with following(Path(request.spec.progress), on_line):
        trained: TrainedModel = train_model(
            request, runner=run.runner, store=run.store, on_line=on_line, on_attempts=on_attempts
        )
    return asdict(trained), time.time() - began
