"""A question or a rollback from somebody's machine: on a cluster a flow in one of its pods gives the answer.

    found = ask(order, TraceQuestion(pipeline="digits", what="3"))

A laptop's is made here. From outside a cluster neither its state volume nor its Services are reached, so its answer is
made inside and comes back through Prefect (flows.run_mirror.tell). Not covered: the flows there (flows.ask_flow,
flows.rollback_flow), what an answer is made of (flows.questions).
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError, TryAgain
from flows.cluster_deployment import register_ask, register_rollback
from flows.cluster_settings import ClusterSettings, load_cluster
from flows.display import on_terminal
from flows.fetch import origin_url
from flows.follow import Follower
from flows.place import is_cluster, open_place
from flows.prefect_api import Prefect
from flows.project import Project
from flows.questions import Answer, AuditQuestion, PlanQuestion, Question, TraceQuestion, answer
from flows.run_mirror import told
from flows.settings import PipelineSettings, load_pipeline
from flows.start import Order, at_revision, pipeline_file
from flows.submit import answering, git_url, prefect_url

STARTING_SECONDS = 300.0  # for worker, node and image, before a question is given up


def plan_question(order: Order) -> PlanQuestion:
    """About the order's revision."""
    return PlanQuestion(file=order.pipeline, rev=order.rev, overrides=order.overrides)


def trace_question(order: Order, what: str) -> TraceQuestion:
    """About the order's pipeline. Raises ConfigError."""
    return TraceQuestion(pipeline=load_pipeline(pipeline_file(order)).name, what=what)


def audit_question(order: Order, *, repair: bool) -> AuditQuestion:
    """About the order's pipeline. Raises ConfigError."""
    return AuditQuestion(pipeline=load_pipeline(pipeline_file(order)).name, repair=repair)


def ask(order: Order, question: Question, *, quiet: bool = False) -> Answer:
    """The answer of the order's place. `quiet`: no word while it is made.

    Raises ConfigError, what the asked modules raise, and for a cluster PreflightError (no pool; for a plan: not
    pushed), Unreachable (Prefect is away, no worker takes it) or Interrupted.
    """
    file = pipeline_file(order)
    if is_cluster(order.place, file.parent):
        return _ask_cluster(order, file, question, quiet=quiet)
    from tasks.audit_endpoint import audit_endpoint

    place = open_place(order.place, file.parent)
    return answer(question, place, audit=lambda request: asdict(audit_endpoint(request)))


def ask_for_rollback(order: Order, to: str) -> Answer:
    """An earlier version back in service on the order's cluster; returns what its flow says. Raises as `ask`."""
    file = pipeline_file(order)
    settings, pipeline = load_cluster(order.place, file.parent), load_pipeline(file)
    return _told_by(
        settings,
        pipeline,
        lambda prefect: register_rollback(prefect, pipeline, settings),
        parameters={"to": to},
        title=f"{pipeline.name} back to {to or 'the version before'}",
        command="rollback",
        quiet=True,
    )


def _ask_cluster(order: Order, file: Path, question: Question, *, quiet: bool) -> Answer:
    settings = load_cluster(order.place, file.parent)
    if isinstance(question, PlanQuestion):
        project, pipeline, sha = at_revision(order, file)
        git = git_url(project, settings, sha)
        question = replace(question, file=project.in_repo(file.name), rev=sha)
    else:
        pipeline, git = load_pipeline(file), _known_git(file, settings)
    return _told_by(
        settings,
        pipeline,
        lambda prefect: register_ask(prefect, pipeline, settings, git=git),
        parameters={"question": asdict(question)},
        title=f"{pipeline.name} {question.kind}",
        command=question.kind,
        quiet=quiet or not on_terminal(),
    )


def _told_by(
    settings: ClusterSettings,
    pipeline: PipelineSettings,
    register: Callable[[Prefect], str],
    *,
    parameters: dict[str, Any],
    title: str,
    command: str,
    quiet: bool,
) -> Answer:
    """Start a flow of the cluster's pool, wait for its end, and return what it told."""
    prefect = answering(Prefect(url=prefect_url(settings)))
    flow_run = prefect.start(
        register(prefect),
        parameters=parameters,
        name=title,
        tags=["reprise", pipeline.name],
        idempotency_key=str(uuid.uuid4()),
    )["id"]
    patience = STARTING_SECONDS if command != "rollback" else None
    watching = Follower(
        prefect=prefect, flow_run=flow_run, settings=settings, quiet=quiet, command=command, patience=patience
    )
    watching.follow()
    found = told(prefect, flow_run)
    if not found:
        raise TryAgain(f"{title}: flow run {flow_run} has ended, and its answer did not come through Prefect")
    return found


def _known_git(file: Path, settings: ClusterSettings) -> str:
    """What the pod of a plan clones from, so that other questions register the same; "" where it is not known."""
    with contextlib.suppress(ConfigError):
        return settings.project.git or origin_url(Project(file.parent))
    return ""
