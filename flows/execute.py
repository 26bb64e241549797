"""`reprise run`: from an order to a finished run, with the services it needs, and a clean end whatever happens.

The plan comes first, before anything heavy is imported. When every step is reused nothing is started but the record of
the run. Ctrl-C (or SIGTERM) stops the step that runs, with notice, and leaves a run that `reprise resume` continues.
"""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import replace
from typing import Any

from deployments.errors import StepError, TryAgain
from deployments.workload import INTERRUPTIONS
from flows.display import say, seconds
from flows.plan import Plan
from flows.run import Run
from flows.start import Order, Prepared, begin, prepare
from flows.watch import Watch


class Interrupted(StepError):
    """Somebody pressed Ctrl-C or asked for a cancel; the run can be resumed."""

    exit_code = 130


def execute(order: Order, *, quiet: bool = False) -> dict[str, Any]:
    """Run an order to its end; returns the run's document. Raises its first failing step's error, or Interrupted."""
    prepared = prepare(order)
    files = (prepared.pipeline.file.name, prepared.pipeline.model.module, *prepared.pipeline.model.files)
    dirty = prepared.project.dirty([prepared.project.in_repo(name) for name in files])
    if dirty and not quiet:
        say(f"note: not committed, so not part of the run: {', '.join(dirty)}", style="yellow")
    with _turn(prepared, quiet=quiet):
        plan = prepared.plan()
        if not plan.unchanged:
            prepared.place.ensure(quiet=quiet)
            prepared.place.restore()
            plan = prepared.plan()  # a server that has just come up may serve the version that was asked for
        watch = Watch(quiet=quiet, attempts=len(prepared.store.attempts(plan.steps["train_model"].key)))
        try:
            with begin(prepared, plan, on_event=watch) as run:
                return _reuse(run) if plan.unchanged else _perform(run, prepared.order)
        finally:
            watch.close()


def _turn(prepared: Prepared, *, quiet: bool) -> Any:
    """One run of a pipeline at a time: wait for the one before, then plan on what it left."""
    lock = f"pipeline-{prepared.pipeline.name}"
    if prepared.store.held(lock) and not quiet:
        say(f"another run of {prepared.pipeline.name} is in progress: waiting for it", style="yellow")
    return prepared.store.lock(lock, wait_seconds=prepared.pipeline.train.deadline)


def _reuse(run: Run) -> dict[str, Any]:
    from flows.unchanged import record_unchanged

    plan: Plan = run.plan
    for step in plan.steps.values():
        run.step_changed(step.name, status="reused", reused=True)
    results = {name: step.record.result for name, step in plan.steps.items() if step.record}
    trained, served = results["train_model"], results["deploy_model"]
    run.document["links"] = {"endpoint": served["url"]}
    if flow_run := record_unchanged(run):
        run.document["links"] |= {
            "prefect_flow_run": flow_run,
            "prefect": f"{run.urls['prefect']}/runs/flow-run/{flow_run}",
        }
    run.update(
        status="unchanged",
        closed=True,
        ended=time.time(),
        message="every step is reused",
        model_version=results["register_model"]["version"],
        mar_sha256=results["package_model"]["sha256"],
        endpoint=served["url"],
        metrics=trained["metrics"],
        check=results["check_endpoint"],
    )
    return run.document


def _perform(run: Run, order: Order) -> dict[str, Any]:
    run.plan.place.prepare_client()
    from flows.retrain import retrain  # the orchestrator: seconds of import, so only when something runs

    try:
        asyncio.run(_interruptible(run, retrain, order))
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise Interrupted(f"run {run.id}: interrupted; `reprise resume {run.id}` goes on where it was") from None
    except TryAgain as error:
        raise TryAgain(f"{error}\nrun {run.id}: `reprise resume {run.id}` tries again") from error
    return run.document


async def _interruptible(run: Run, retrain: Any, order: Order) -> None:
    """The flow as a task that a signal cancels, once the workload in progress has been told to stop."""
    loop = asyncio.get_running_loop()
    flow = asyncio.ensure_future(
        retrain(
            pipeline=str(run.plan.pipeline.file),
            rev=order.rev,
            overrides=list(order.overrides),
            place=order.place,
            cause=order.cause,
        )
    )
    presses = 0

    def on_signal() -> None:
        nonlocal presses
        presses += 1
        run.event("line", step="run", line="stopping")
        name, grace = run.workload, None if presses == 1 else 0.0
        if name:
            loop.run_in_executor(None, lambda: run.runner.stop(name, grace_seconds=grace))
        flow.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    await flow


def resumed(order: Order, document: dict[str, Any], run: str) -> Order:
    """The order that continues a run: its own commit and changes."""
    return replace(
        order,
        pipeline=document["pipeline_file"],
        rev=document["git_sha"],
        overrides=tuple(document["overrides"]),
        resume=run,
    )


def summary(document: dict[str, Any]) -> list[tuple[str, str]]:
    """What one wants to know of a finished run, as (name, value)."""
    attempts = document["attempts"]
    took = (document["ended"] or time.time()) - document["started"]
    lines = [
        (
            "run",
            f"{document['run']}: {document['status']} in {seconds(took)}",
        ),
        ("commit", f"{document['git_sha'][:12]}, data {document['data_digest'][:12]}"),
    ]
    if attempts:
        cut = [a for a in attempts if a["cause"] in INTERRUPTIONS]
        errors = sum(a["cause"] in ("user_error", "out_of_memory") for a in attempts)
        counted = f"{len(attempts)} attempts, {len(cut)} interruptions" + (f", {errors} errors" if errors else "")
        lines.append(("training", counted))
        for a in cut:
            saved = f", saved {a['notice_to_saved']:.2f} s after the notice" if a["notice_to_saved"] is not None else ""
            lines.append(("", f"{a['cause']} at step {a['reached_step']}: {a['steps_lost']} steps lost{saved}"))
    if document["metrics"]:
        lines.append(("held-out", ", ".join(f"{k} {v:.4g}" for k, v in sorted(document["metrics"].items()))))
    if document["model_version"]:
        lines.append(("model", f"{document['pipeline']} version {document['model_version']}"))
    if document["mar_sha256"]:
        lines.append((".mar", f"sha256 {document['mar_sha256']}"))
    if check := document.get("check"):
        lines.append(
            (
                "endpoint",
                f"{check['samples']} held-out samples, agreement {check['agreement']:.4g}, "
                f"p95 {check['p95_ms']:.1f} ms",
            )
        )
    names = {
        "prefect": "Prefect",
        "mlflow_run": "MLflow",
        "model": "version",
        "report": "report",
        "endpoint": "serves at",
    }
    lines += [(text, document["links"][key]) for key, text in names.items() if document["links"].get(key)]
    return lines
