"""Drive one training to its end, through every interruption, and keep its ledger.

This is the only step that is not a program of its own: it is the loop that launches the trainer (a Workload), reads how
that attempt ended, and launches it again until the checkpoint's manifest says step == max_steps. A process that exits
0 proves nothing; the manifest does. Interruptions and errors have a budget each. After a kill of whoever ran this
function, calling it again adopts the running attempt or resumes from the newest checkpoint.

    train_model(TrainRequest(...), runner=Laptop(...), store=Store(...))

Not covered: the trainer itself (training.launch, training.train), where it runs (the Runner).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError, GiveUp, TryAgain
from deployments.workload import INTERRUPTIONS, Outcome, Resources, Runner, Workload
from tasks.records import Attempt, Store
from training.progress import EVERY
from training.spec import EXIT_BAD_SPEC, EXIT_NO_GOOD_CHECKPOINT, TrainResult, TrainSpec
from training.tracking import (
    ChangedParameters,
    TrackingRefused,
    TrackingUnavailable,
    end_run,
    find_or_create_run,
    set_tags,
)


class Cancelled(GiveUp):
    """Somebody stopped the training; its newest checkpoint stands and a resume continues from it."""

    exit_code = 130


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """One training: the spec of the trainer, and how it is run."""

    spec: TrainSpec
    experiment: str  # MLflow experiment: the pipeline's name
    workers: int = 1  # processes, data parallel
    interruptions: int = 20  # budget
    errors: int = 2  # budget
    deadline_seconds: float | None = None  # wall clock over all attempts
    since: float = 0.0  # unix seconds: budgets and deadline count from here; a person's resume renews them
    spot: bool = True
    grace_seconds: float = 30.0
    resources: Resources = field(default_factory=Resources)
    tags: dict[str, str] = field(default_factory=dict)  # lineage, on the MLflow run


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A complete training."""

    key: str
    run_id: str  # the one MLflow run of all attempts
    metrics: dict[str, float]  # on the held-out split
    weights: str
    weights_sha256: str
    heldout: str  # heldout.jsonl: requests, labels and the model's own answers
    steps: int
    parameters: int
    attempts: int
    interruptions: int
    steps_lost: int
    seconds: float  # training time over all attempts
    progress: str  # the trainer's JSON lines, over all attempts


def train_model(
    request: TrainRequest,
    *,
    runner: Runner,
    store: Store,
    on_line: Callable[[str], None] | None = None,
    on_attempts: Callable[[list[Attempt]], None] | None = None,
) -> TrainedModel:
    """Train until complete. Raises GiveUp when a budget is spent, Cancelled when somebody stopped it."""
    spec = replace(request.spec, mlflow_run=_tracking_run(request))
    Path(spec.output).mkdir(parents=True, exist_ok=True)
    with store.lock(f"training-{spec.key[:16]}", wait_seconds=10):
        while not (result := _finished(spec)):
            attempts = store.attempts(spec.key)
            _check_budgets(request, attempts)
            attempts = _open_attempt(attempts, request)
            store.write_attempts(spec.key, attempts)
            if on_attempts:
                on_attempts(attempts)
            outcome = runner.run(attempt_workload(request, replace(spec, attempt=attempts[-1].number)), on_line=on_line)
            attempts = [*attempts[:-1], _close_attempt(attempts[-1], outcome, spec)]
            store.write_attempts(spec.key, attempts)
            if on_attempts:
                on_attempts(attempts)
            _stop_or_go_on(outcome, attempts[-1], spec)
        attempts = store.attempts(spec.key)
    _tag_attempts(spec, attempts)
    return TrainedModel(
        key=spec.key,
        run_id=spec.mlflow_run,
        metrics=result.metrics,
        weights=result.weights,
        weights_sha256=result.weights_sha256,
        heldout=result.heldout,
        steps=result.max_steps,
        parameters=result.parameters,
        attempts=len(attempts),
        interruptions=sum(a.cause in INTERRUPTIONS for a in attempts),
        steps_lost=sum(max(0, a.reached_step - a.to_step) for a in attempts),
        seconds=result.seconds,
        progress=spec.progress,
    )


def _tracking_run(request: TrainRequest) -> str:
    spec = request.spec
    if not spec.mlflow_uri:
        return ""
    fixed = {
        "epochs": spec.epochs,
        "batch_size": spec.batch_size,
        "accumulate": spec.accumulate,
        "seed": spec.seed,
        "workers": request.workers,
        "precision": spec.precision,
        **spec.params,
    }
    name = f"{spec.pipeline}-{spec.key[:7]}"
    try:
        return find_or_create_run(spec.mlflow_uri, request.experiment, spec.key, name, tags=request.tags, params=fixed)
    except TrackingUnavailable as error:
        raise TryAgain(str(error)) from error
    except (TrackingRefused, ChangedParameters) as error:
        raise GiveUp(str(error)) from error


def _tag_attempts(spec: TrainSpec, attempts: list[Attempt]) -> None:
    """Best effort: the ledger is the record, the MLflow tags are a copy for whoever looks there."""
    if not spec.mlflow_run:
        return
    rows = [f"{a.number}: {a.cause}, steps {a.from_step}-{a.to_step}" for a in attempts]
    tags = {"reprise.attempts": str(len(attempts)), "reprise.ledger": "; ".join(rows)}
    try:
        set_tags(spec.mlflow_uri, spec.mlflow_run, tags)
        end_run(spec.mlflow_uri, spec.mlflow_run)
    except (TrackingUnavailable, TrackingRefused):
        return


def _finished(spec: TrainSpec) -> TrainResult | None:
    """The result of a complete training. It is written last, after the manifest of step == max_steps."""
    try:
        result = TrainResult.read(Path(spec.output) / "result.json")
    except FileNotFoundError:
        return None
    if result.key != spec.key or result.step != result.max_steps:
        raise GiveUp(
            f"{spec.output}/result.json: belongs to training {result.key[:12]} at step {result.step} of "
            f"{result.max_steps}, expected {spec.key[:12]} complete; remove the folder to train anew"
        )
    return result


def _check_budgets(request: TrainRequest, attempts: list[Attempt]) -> None:
    attempts = [a for a in attempts if a.started >= request.since]
    ended = [a for a in attempts if a.ended is not None]
    interruptions = [a for a in ended if a.cause in INTERRUPTIONS]
    errors = [a for a in ended if a.cause in ("user_error", "out_of_memory")]
    if len(interruptions) > request.interruptions:
        raise GiveUp(
            f"training {request.spec.key[:12]}: interrupted {len(interruptions)} times, budget [train] interruptions = "
            f"{request.interruptions}; the newest checkpoint stands: raise the budget and run again to resume"
        )
    if len(errors) > request.errors:
        raise GiveUp(
            f"training {request.spec.key[:12]}: failed {len(errors)} times, budget [train] errors = {request.errors}; "
            f"last: {errors[-1].reason}"
        )
    idle = [a for a in ended if a.cause == "complete"]
    if len(idle) > request.errors + 1:
        raise GiveUp(
            f"training {request.spec.key[:12]}: the trainer exited 0 without being complete {len(idle)} times; "
            "its manifest never reached the last step: look at its log"
        )
    began = attempts[0].started if attempts else time.time()
    if request.deadline_seconds is not None and time.time() - began > request.deadline_seconds:
        raise GiveUp(
            f"training {request.spec.key[:12]}: not done within [train] deadline = {request.deadline_seconds:g} s"
        )


def _open_attempt(attempts: list[Attempt], request: TrainRequest) -> list[Attempt]:
    """The attempt to run now: the last one if it was left open by a killed flow, otherwise a new row."""
    if attempts and attempts[-1].ended is None:
        return attempts
    last = attempts[-1] if attempts else None
    now = time.time()
    row = Attempt(
        number=last.number + 1 if last else 1,
        started=now,
        from_step=last.to_step if last else 0,
        idle_seconds=round(now - last.ended, 3) if last and last.ended else 0.0,
        capacity="spot" if request.spot else "on-demand",
    )
    return [*attempts, row]


def attempt_workload(request: TrainRequest, spec: TrainSpec) -> Workload:
    """One attempt of a training, as a place runs it."""
    return Workload(
        name=f"train-{spec.key[:12]}-{spec.attempt}",
        image="train",
        command=("python", "-m", "training.launch", "--spec", "{request}", "--processes", str(request.workers)),
        request=asdict(spec),
        env={"REPRISE_PROGRESS": spec.progress, EVERY: "0.1", "OMP_NUM_THREADS": str(spec.threads)},
        resources=request.resources,
        processes=request.workers,
        spot=request.spot,
        grace_seconds=request.grace_seconds,
        deadline_seconds=request.deadline_seconds,
        labels={"pipeline": spec.pipeline, "step": "train_model", "key": spec.key[:12]},
    )


def _close_attempt(attempt: Attempt, outcome: Outcome, spec: TrainSpec) -> Attempt:
    """Fill the row from what the trainer said of this attempt; what it did not say stays at its default."""
    lines = [e for e in progress_of(spec.progress) if float(e.get("time", 0)) >= attempt.started]
    committed = [int(e["step"]) for e in lines if e.get("event") in ("checkpoint", "saved", "resumed", "complete")]
    reached = [int(e["step"]) for e in lines if "step" in e]
    resumed = [int(e["step"]) for e in lines if e.get("event") == "resumed"]
    saved = [float(e["time"]) for e in lines if e.get("event") == "saved"]
    restarts = sum(e.get("event") == "restarted" for e in lines)
    again = f"; workers started again {restarts} times within it" if restarts else ""
    from_step = resumed[0] if resumed else attempt.from_step
    return replace(
        attempt,
        ended=outcome.ended,
        cause=outcome.cause,
        reason=_why(outcome) + again,
        exit_code=outcome.exit_code,
        from_step=from_step,
        to_step=max([from_step, *committed]),
        reached_step=max([from_step, *reached]),
        notice_to_saved=round(saved[-1] - outcome.notice, 3) if saved and outcome.notice else None,
        node=outcome.node,
        capacity=outcome.capacity or attempt.capacity,
    )


def progress_of(path: str) -> list[dict[str, Any]]:
    """The trainer's JSON lines over all attempts. A line cut by a kill is left out."""
    lines: list[dict[str, Any]] = []
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        return lines
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _why(outcome: Outcome) -> str:
    """The trainer's own last word, where it had one."""
    if outcome.cause != "user_error" or not outcome.log:
        return outcome.reason
    try:
        lines = Path(outcome.log).read_text(errors="replace").splitlines()
    except OSError:
        return outcome.reason
    said = [line.partition(": exit ")[2] for line in lines if line.startswith("training.launch: exit ")]
    return f"exit {said[-1]}; its log is {outcome.log}" if said else f"{outcome.reason}; its log is {outcome.log}"


def _stop_or_go_on(outcome: Outcome, attempt: Attempt, spec: TrainSpec) -> None:
    if outcome.cause == "cancelled":
        raise Cancelled(
            f"training {spec.key[:12]}: cancelled; its checkpoint of step {attempt.to_step} stands, "
            "resume continues there"
        )
    if outcome.cause == "deadline":
        raise GiveUp(f"training {spec.key[:12]}: {outcome.reason}; its checkpoint of step {attempt.to_step} stands")
    if outcome.exit_code in (EXIT_BAD_SPEC, EXIT_NO_GOOD_CHECKPOINT):
        raise (ConfigError if outcome.exit_code == EXIT_BAD_SPEC else GiveUp)(
            f"training {spec.key[:12]}: {attempt.reason}"
        )
