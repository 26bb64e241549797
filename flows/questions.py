"""What can be asked about models and what serves them; the answer is JSON, made by the same modules on every place.

    answer(TraceQuestion(pipeline="digits", what="3"), place, audit=...)

A question is plain values, because it travels to a cluster as a flow's parameter. Not covered: who is asked (flows.ask,
flows.ask_flow), showing an answer (flows.commands, flows.model_commands).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from flows.place import Place
from flows.start import Order, prepare

if TYPE_CHECKING:
    from tasks.audit_endpoint import AuditRequest


@dataclass(frozen=True, kw_only=True)
class PlanQuestion:
    """What would run, what is reused, and why."""

    kind: Literal["plan"] = "plan"
    file: str  # the pipeline file, as `Place.bring` takes it
    rev: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TraceQuestion:
    """Where a model version comes from."""

    kind: Literal["trace"] = "trace"
    pipeline: str
    what: str  # a version, an alias, a label, an endpoint's address; empty: what is in service


@dataclass(frozen=True, kw_only=True)
class UsesQuestion:
    """Which model versions were trained on these data."""

    kind: Literal["who-uses"] = "who-uses"
    digest: str  # DVC's, or its first digits


@dataclass(frozen=True, kw_only=True)
class AuditQuestion:
    """Whether alias, endpoint and archive say the same."""

    kind: Literal["audit"] = "audit"
    pipeline: str
    repair: bool = False


Question = PlanQuestion | TraceQuestion | UsesQuestion | AuditQuestion
Answer = dict[str, Any]
Audit = Callable[["AuditRequest"], Answer]  # how an audit is made there: tasks.audit_endpoint, here or in a step's pod


def answer(question: Question, place: Place, *, audit: Audit) -> Answer:
    """The answer, made where the place's store and services are reached. Raises what the asked modules raise."""
    if isinstance(question, PlanQuestion):
        return _plan(question, place)
    if isinstance(question, TraceQuestion):
        from tasks.lineage import trace

        mlflow, page = place.urls["mlflow"], place.pages["mlflow"]
        return asdict(trace(mlflow, question.pipeline, question.what or "champion", store=place.store, page=page))
    if isinstance(question, UsesQuestion):
        from tasks.lineage import who_uses

        return {"uses": [asdict(use) for use in who_uses(place.urls["mlflow"], question.digest)]}
    return audit(_audit_request(question, place))


def _plan(question: PlanQuestion, place: Place) -> Answer:
    order = Order(pipeline=question.file, rev=question.rev, overrides=tuple(question.overrides))
    plan = prepare(order, place).plan()
    steps = [
        {"name": s.name, "key": s.key, "reused": s.reused, "reason": s.reason, "inputs": s.inputs}
        for s in plan.steps.values()
    ]
    return {
        "pipeline": plan.pipeline.name,
        "git_sha": plan.git_sha,
        "data_digest": plan.data.digest,
        "data_files": plan.data.nfiles,
        "code_digest": plan.code_digest,
        "unchanged": plan.unchanged,
        "steps": steps,
    }


def _audit_request(question: AuditQuestion, place: Place) -> AuditRequest:
    from tasks.audit_endpoint import AuditRequest

    return AuditRequest(
        pipeline=question.pipeline,
        management_url=place.urls["management"],
        inference_url=place.urls["inference"],
        tracking_uri=place.urls["mlflow"],
        record=str(place.store.path / "endpoints"),
        repair=question.repair,
        cluster=place.target,
    )
