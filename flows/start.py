"""From an order (which pipeline, which revision, which changes) to a run that can start.

`prepare` is light: settings and plan, nothing started. `begin` takes the run's lock and hands out the Run. Both are
used by the command and by the flow itself when Prefect starts it. Not covered: the steps (flows.retrain).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from deployments.errors import ConfigError
from deployments.workload import Runner
from flows.module_check import check_module
from flows.on_laptop import OnLaptop
from flows.place import Place
from flows.plan import Plan, make_plan
from flows.project import Project
from flows.run import Event, Run, attempt_row, open_run
from flows.settings import PipelineSettings, PlaceSettings, find_pipeline, load_pipeline, load_place
from tasks.records import Store


@dataclass(frozen=True, kw_only=True)
class Order:
    """What somebody asked for."""

    pipeline: str = ""  # file; empty: pipeline.toml here, above, or of the demo
    rev: str = "HEAD"
    overrides: tuple[str, ...] = ()  # "train.epochs=3"
    place: str = "laptop"
    cause: str = "command"  # command | schedule | form | push
    interruptions: tuple[str, ...] = ()  # the laptop's spot market; none: those of the place
    resume: str = ""  # run id


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An order, read and planned."""

    order: Order
    project: Project
    pipeline: PipelineSettings
    place: Place
    git_sha: str

    @property
    def store(self) -> Store:
        """The place's."""
        return self.place.store

    @property
    def urls(self) -> dict[str, str]:
        """The place's."""
        return self.place.urls

    def plan(self) -> Plan:
        """What would run now."""
        return make_plan(self.pipeline, self.place, self.project, self.store, self.git_sha)


prepared_run: ContextVar[Run | None] = ContextVar("prepared_run", default=None)


def run_title(run: Run) -> str:
    """What the flow run is called in Prefect: run, commit, cause."""
    return f"{run.id} {run.plan.git_sha[:7]} {run.document['cause']}"


def run_name() -> str:
    """The name of the flow run in Prefect until its run begins: what was asked for, where Prefect made a name up."""
    if (run := prepared_run.get()) is not None:
        return run_title(run)
    from prefect import runtime

    name, asked = str(runtime.flow_run.name or "retrain"), runtime.flow_run.parameters or {}
    if not re.fullmatch(r"[a-z0-9]+-[a-z0-9]+", name) or not runtime.deployment.name:
        return name  # of a push, of its run, of a person
    return f"{runtime.deployment.name} {str(asked.get('rev', 'HEAD'))[:60]} {asked.get('cause', 'form')}"


def pipeline_file(order: Order) -> Path:
    """The pipeline file of an order. Raises ConfigError if there is none."""
    file = Path(order.pipeline).absolute() if order.pipeline else find_pipeline(Path.cwd())
    if not file.is_file():
        raise ConfigError(
            f"--pipeline {order.pipeline}: no such file; expected a pipeline.toml (`reprise demo` makes one)"
        )
    return file


def there(order: Order) -> str:
    """What a command has to be told to be about the order's place: "" for the default."""
    return f" --place {order.place}" if order.place != "laptop" else ""


def where(order: Order) -> tuple[Path, PlaceSettings, Store]:
    """The pipeline file, the laptop and the store of an order. Raises ConfigError, also for a cluster."""
    file = pipeline_file(order)
    place = load_place(order.place, file.parent)
    return file, place, Store(root=str(place.state / "store"))


def at_revision(order: Order, file: Path) -> tuple[Project, PipelineSettings, str]:
    """The project, the pipeline as its file is at the order's revision, and that commit. Raises ConfigError."""
    project = Project(file.parent)
    sha = project.resolve(order.rev)
    text = project.read_text(sha, project.in_repo(file.name))
    pipeline = load_pipeline(text, source_name=f"{file.name}@{sha[:7]}", overrides=order.overrides, file=file)
    module = pipeline.model.module
    with pipeline.blaming("model", "module"):
        check_module(project.read_text(sha, project.in_repo(module)), f"{module}@{sha[:7]}")
    return project, pipeline, sha


def prepare(order: Order, place: Place | None = None) -> Prepared:
    """Read the pipeline at the revision, and the place if none is given: a laptop. Raises ConfigError."""
    file = pipeline_file(order)
    place = place or OnLaptop(settings=load_place(order.place, file.parent))
    project, pipeline, sha = at_revision(order, file)
    return Prepared(order=order, project=project, pipeline=pipeline, place=place, git_sha=sha)


def make_runner(prepared: Prepared) -> Runner:
    """The place's runner."""
    return prepared.place.runner(prepared.order.interruptions)


@contextmanager
def begin(prepared: Prepared, plan: Plan, *, on_event: Event = lambda kind, fields: None) -> Iterator[Run]:
    """The run, under its lock: an unfinished one of the same work goes on, otherwise it is new."""
    order = prepared.order
    opened = open_run(
        plan, prepared.store, rev=order.rev, overrides=list(order.overrides), cause=order.cause, resume=order.resume
    )
    with opened as (run_id, document):
        document["attempts"] = [attempt_row(a) for a in prepared.store.attempts(plan.steps["train_model"].key)]
        run = Run(
            id=run_id,
            plan=plan,
            store=prepared.store,
            runner=make_runner(prepared),
            urls=prepared.urls,
            document=document,
            on_event=on_event,
        )
        token = prepared_run.set(run)
        try:
            yield run
        finally:
            prepared_run.reset(token)
