"""Drive one training to its end, through every interruption, and keep its ledger.

This is the only step that is not a program of its own: it is the loop that launches the trainer (a Workload), reads how
that attempt ended, and launches it again until the checkpoint's manifest says step == max_steps. A process that exits
0 proves nothing; the manifest does. Interruptions and errors have a budget each. After a kill of whoever ran this
function, calling it again adopts the running attempt or resumes from the newest checkpoint.

    train_model(TrainRequest(...), runner=Laptop(...), store=Store(...))

An attempt that found no node in time spends neither budget; the deadline bounds how often that may happen.
Not covered: the trainer itself (training.launch, training.train), where it runs (the Runner), spot or on-demand
(capacity.py), a row of the ledger (attempts.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from deployments.errors import ConfigError, GiveUp, PreflightError, TryAgain
from deployments.workload import INTERRUPTIONS, Outcome, Resources, Runner, Workload
from tasks.attempts import close_attempt, open_attempt, progress_of
from tasks.capacity import SPOT, CapacityPolicy, Choice, choose, seconds_left
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
    workers: int = 1  # processes over all nodes, data parallel
    nodes: int = 1  # that share the workers evenly
    interruptions: int = 20  # budget
    errors: int = 2  # budget
    deadline_seconds: float | None = None  # wall clock over all attempts
    since: float = 0.0  # unix seconds: budgets and deadline count from here; a person's resume renews them
    capacity: CapacityPolicy = field(default_factory=CapacityPolicy)
    grace_seconds: float = 30.0
    resources: Resources = field(default_factory=Resources)
    tags: dict[str, str] = field(default_factory=dict)  # lineage, on the MLflow run

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.workers % self.nodes:
            raise ConfigError(
                f"{self.workers} workers ([train] workers) on {self.nodes} nodes ([resources.train_model] nodes): "
                "expected a number of workers that the nodes share evenly"
            )


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
    with store.lock(f"training-{spec.key[:16]}", wait_seconds=10), _end_told(spec, store):
        # Finished while nobody watched, an attempt's end is still to be told: it is asked for under its own name.
        while not (result := _finished(spec)) or _left_open(store.attempts(spec.key)):
            attempts = store.attempts(spec.key)
            if result is None:
                _check_budgets(request, attempts)
            attempts = _next_attempt(request, attempts, on_line or (lambda line: None))
            store.write_attempts(spec.key, attempts)
            if on_attempts:
                on_attempts(attempts)
            try:
                outcome = runner.run(attempt_workload(request, spec, attempts), on_line=on_line)
            except PreflightError:  # refused before anything ran: that was no attempt
                store.write_attempts(spec.key, attempts[:-1])
                if on_attempts:
                    on_attempts(attempts[:-1])
                raise
            attempts = [*attempts[:-1], close_attempt(attempts[-1], outcome, spec.progress)]
            store.write_attempts(spec.key, attempts)
            if on_attempts:
                on_attempts(attempts)
            _stop_or_go_on(outcome, attempts[-1], spec)
        attempts = store.attempts(spec.key)
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


def _left_open(attempts: list[Attempt]) -> bool:
    """Whether the last row has no end: it runs, or ended after the flow that watched it was killed."""
    return bool(attempts) and attempts[-1].ended is None


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


@contextlib.contextmanager
def _end_told(spec: TrainSpec, store: Store) -> Iterator[None]:
    """Tell MLflow how the training ended. One that may go on by itself, or that never began, keeps its status."""
    try:
        yield
    except PreflightError:
        raise
    except GiveUp as error:
        _tag_attempts(spec, store.attempts(spec.key), "KILLED" if isinstance(error, Cancelled) else "FAILED")
        raise
    _tag_attempts(spec, store.attempts(spec.key), "FINISHED")


def _tag_attempts(spec: TrainSpec, attempts: list[Attempt], status: str) -> None:
    """Best effort: the ledger is the record, MLflow's tags and status are a copy for whoever looks there."""
    if not spec.mlflow_run:
        return
    rows = [f"{a.number}: {a.cause}, steps {a.from_step}-{a.to_step}" for a in attempts]
    tags = {"reprise.attempts": str(len(attempts)), "reprise.ledger": "; ".join(rows)}
    try:
        set_tags(spec.mlflow_uri, spec.mlflow_run, tags)
        end_run(spec.mlflow_uri, spec.mlflow_run, status)
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
    began = _began(request, attempts, now=time.time())
    if request.deadline_seconds is not None and time.time() - began > request.deadline_seconds:
        raise GiveUp(
            f"training {request.spec.key[:12]}: not done within [train] deadline = {request.deadline_seconds:g} s"
        )


def _next_attempt(request: TrainRequest, attempts: list[Attempt], say: Callable[[str], None]) -> list[Attempt]:
    """The ledger with the attempt to run now: the last row if a killed flow left it open, otherwise a new one."""
    if attempts and attempts[-1].ended is None:
        return attempts
    row = open_attempt(attempts, _choice(request, attempts, now=time.time()), now=time.time())
    if row.asked:
        say(f"training {request.spec.key[:12]}: attempt {row.number} asks for {row.capacity}: {row.asked}")
    return [*attempts, row]


def first_attempt(request: TrainRequest, *, now: float) -> Attempt:
    """The row of an attempt that none came before. Unix seconds."""
    return open_attempt((), _choice(request, [], now=now), now=now)


def _choice(request: TrainRequest, attempts: list[Attempt], *, now: float) -> Choice:
    """The capacity of the attempt after these; the ledger before a person's resume does not count."""
    until = left = None
    if request.deadline_seconds is not None and request.capacity.fallback:
        until = _began(request, attempts, now=now) + request.deadline_seconds
        lines = progress_of(request.spec.progress)
        left = seconds_left(lines, attempts[-1].to_step if attempts else 0)
    recent = [a for a in attempts if a.started >= request.since]
    return choose(request.capacity, recent, now=now, until=until, left=left)


def _began(request: TrainRequest, attempts: list[Attempt], *, now: float) -> float:
    """Since when the deadline counts."""
    return next((a.started for a in attempts if a.started >= request.since), now)


def attempt_workload(request: TrainRequest, spec: TrainSpec, attempts: list[Attempt]) -> Workload:
    """The last of these attempts as a place runs it. The same rows give the same workload, so that it is adopted."""
    row, before = attempts[-1], attempts[:-1]
    per_node = request.workers // request.nodes
    deadline = request.deadline_seconds
    if deadline is not None:
        deadline = max(1.0, deadline - (row.started - _began(request, attempts, now=row.started)))
    return Workload(
        name=f"train-{spec.key[:12]}-{row.number}",
        image="train",
        command=("python", "-m", "training.launch", "--spec", "{request}", "--processes", str(per_node)),
        request=asdict(replace(spec, attempt=row.number)),
        env={"REPRISE_PROGRESS": spec.progress, EVERY: "0.1", "OMP_NUM_THREADS": str(spec.threads)},
        resources=request.resources,
        replicas=request.nodes,
        processes=per_node,
        spot=row.capacity == SPOT,
        grace_seconds=request.grace_seconds,
        deadline_seconds=deadline,
        start_seconds=_choice(request, before, now=row.started).start_seconds,
        labels={"pipeline": spec.pipeline, "step": "train_model", "key": spec.key[:12]},
    )


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
