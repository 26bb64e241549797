"""A step as a program on the run's runner: what is started, and how its end is read. No Prefect here.

Not covered: reuse and retries (flows.steps), the training, which is a loop over attempts (tasks.train_model).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from deployments.errors import WORDS, GiveUp, TryAgain
from deployments.workload import Outcome, Workload
from flows.run import Run
from tasks.step import EXIT_TRY_AGAIN


def step_workload(run: Run, name: str, request: Any) -> Workload:
    """The program of one step. Named after key and run: a killed flow adopts what it started, and an older run's
    outcome is no answer to a new question."""
    return Workload(
        name=f"{name.replace('_', '-')}-{run.plan.steps[name].key[:12]}-{run.number}",
        image="step",
        command=("python", "-m", "tasks.step", name, "{request}", "{result}"),
        request=asdict(request),
        resources=run.plan.place.wanted(name),
        account="deploy" if name == "deploy_model" else "",
        labels={
            "run": run.id,
            "pipeline": run.plan.pipeline.name,
            "step": name,
            "key": run.plan.steps[name].key[:12],
        },
    )


def run_program(run: Run, workload: Workload, step: str) -> dict[str, Any]:
    """Run a step program on the run's runner; returns its result document or raises its error."""
    run.workload = workload.name
    try:
        outcome = run.runner.run(workload, on_line=lambda line: run.event("line", step=step, line=line))
    finally:
        run.workload = ""
    return judge(outcome, step)


def judge(outcome: Outcome, step: str) -> dict[str, Any]:
    """The result document of a step program that did its work; raises its error otherwise."""
    document = outcome.result or {}
    if outcome.cause == "cancelled":
        raise GiveUp(f"{step}: cancelled")
    if outcome.exit_code == 0 and document.get("ok"):
        return document
    if error := document.get("error"):
        raise WORDS.get(error["type"], GiveUp)(error["message"])
    kind = TryAgain if outcome.exit_code in (None, EXIT_TRY_AGAIN) or outcome.exit_code >= 128 else GiveUp
    raise kind(f"{step}: {outcome.reason}; its log is {outcome.log}")
