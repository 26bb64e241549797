"""A person between the trained model and its rollout: `[deploy] approval = true`, answered in Prefect's UI.

A run that Prefect started is suspended: its process ends, nothing is held, and Prefect starts it again when somebody
answers; the steps before are reused by their keys. A run of the command has no deployment to come back through, so it
waits. The answer is kept in the store by the step's key: a killed run does not ask twice. Not covered: the gate, which
has spoken before (tasks.gate), and who may answer (Prefect's own access control).
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, Literal

from prefect import runtime
from prefect.flow_runs import apause_flow_run, asuspend_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from pydantic import Field, ValidationError

from deployments.errors import GateRefused
from flows.publish import told_so_far
from flows.result_page import headline, numbers, training_words
from flows.run import Run
from flows.unanswered import remember_waiting
from tasks.register_model import RegisteredModel


class Approval(RunInput):
    """What Prefect's UI asks for."""

    # No default: a resume without an answer (a command, an automation, a slip) puts nothing into service.
    decision: Literal["deploy", "refuse"] = Field(
        title="Decision", description="deploy: into service; refuse: the old version goes on."
    )
    comment: str = Field(default="", title="Comment", description="Kept with the run.", max_length=2000)


async def approved(run: Run, model: RegisteredModel) -> None:
    """Wait for a person if the pipeline asks for one. Raises GateRefused for a no, or where a newer version serves."""
    step, deploy = run.plan.steps["deploy_model"], run.plan.pipeline.deploy
    if not deploy.approval or step.reused:
        return
    record = f"approvals/{step.key}"
    answer = run.store.read(record)
    if answer is None or _may_change(answer, run):
        given = await _ask(run, model, step.key, int(deploy.approval_within))
        answer = {"decision": given.decision, "comment": given.comment, "run": run.id}
        run.store.write(record, answer)
    run.update(status="running", message="", approval=answer)
    if answer["decision"] == "refuse":
        said = f": {answer['comment']}" if answer["comment"] else ""
        raise GateRefused(
            f"version {model.version} of {run.plan.pipeline.name} was refused by a person{said}"
            "; a run from the form or the command asks again"
        )
    serving = ((run.store.read(f"endpoints/{run.plan.pipeline.name}") or {}).get("serving") or {}).get("version", "0")
    if int(serving) > int(model.version):
        raise GateRefused(
            f"version {model.version} of {run.plan.pipeline.name} was approved, but the newer version {serving} is in "
            "service by now; put the older one back with: reprise rollback --to " + model.version
        )


def _may_change(answer: dict[str, Any], run: Run) -> bool:
    """Somebody who starts another run of what was refused wants to be asked; a schedule would ask every night."""
    return bool(answer["decision"] == "refuse" and answer["run"] != run.id and run.document["cause"] != "schedule")


async def _ask(run: Run, model: RegisteredModel, key: str, seconds: int) -> Approval:
    where = run.document["links"].get("prefect", run.urls["prefect"])
    run.update(status="waiting", message=f"version {model.version} waits for approval: {where}")
    run.event("line", step="deploy_model", line=f"deploy_model: waits for approval of version {model.version}: {where}")
    remember_waiting(run)
    await told_so_far(run)
    get_run_logger().info(headline(run.document))
    asked = Approval.with_initial_data(description=question(run, model))
    for time in itertools.count():  # by Prefect's count: a pause that ended is over, also where nobody answered it
        name = f"deploy-{key[:12]}-{time}"
        # An answer that lacks the decision is none: cancelled or out of time, and retried since.
        with contextlib.suppress(ValidationError):
            if runtime.deployment.id:
                return await asuspend_flow_run(wait_for_input=asked, timeout=seconds, key=name)
            return await apause_flow_run(wait_for_input=asked, timeout=seconds, poll_interval=2, key=name)
    raise AssertionError("never: a pause under a new name waits or ends the process")


def question(run: Run, model: RegisteredModel) -> str:
    """What a person needs to decide, as Markdown: the numbers, the gate's words, what is in service now."""
    document, name = run.document, run.plan.pipeline.name
    serving = ((run.store.read(f"endpoints/{name}") or {}).get("serving") or {}).get("version")
    lines = [
        f"**{name}** version {model.version}, commit {document['git_sha'][:7]}: {numbers(document['metrics'])}.",
        *(f"- {sentence}" for sentence in model.decision.get("sentences", ())),
        f"- in service now: {f'version {serving}' if serving else 'nothing yet'}",
        *([f"- trained in {training_words(document)}"] if document["attempts"] else []),
        *([f"- changed for this run: {', '.join(document['overrides'])}"] if document["overrides"] else []),
        "",
        f"[The version in MLflow]({document['links'].get('model', model.model_url)})",
    ]
    return "\n".join(lines)
