"""A question about a cluster's models, inside: a flow in a pod of its work pool makes the answer.

An audit is a step of its own, because only the account of deploying steps may look at everything that serves, and mend
it. Not covered: asking (flows.ask), what an answer is made of (flows.questions).
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prefect import flow, runtime
from pydantic import Field

from flows.lone_step import LoneStep
from flows.place import open_place
from flows.prefect_api import Prefect
from flows.questions import Answer, AuditQuestion, PlanQuestion, TraceQuestion, UsesQuestion, answer
from flows.run_mirror import tell

if TYPE_CHECKING:
    from tasks.audit_endpoint import AuditRequest

AnyQuestion = Annotated[PlanQuestion | TraceQuestion | UsesQuestion | AuditQuestion, Field(discriminator="kind")]


@flow(name="ask", persist_result=False)
async def ask_on_cluster(question: AnyQuestion, place: str = "cluster") -> dict[str, Any]:
    """The answer. Raises what the asked modules raise."""
    here, flow_run = open_place(place, Path()), str(runtime.flow_run.id)
    here.ensure()
    if isinstance(question, PlanQuestion):
        file, rev = await asyncio.to_thread(here.bring, question.file, question.rev)
        question = replace(question, file=str(file), rev=rev)
    step = LoneStep(place=here, name="audit_endpoint", flow_run=flow_run)

    def audit(request: AuditRequest) -> Answer:
        return step.run(request, pipeline=request.pipeline)

    with step.ending():
        found = await asyncio.to_thread(answer, question, here, audit=audit)
    tell(Prefect(url=here.urls["prefect"]), flow_run, found)
    return found
