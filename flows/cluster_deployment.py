"""A pipeline registered with a cluster's Prefect: the deployment `retrain/<pipeline>` of its Kubernetes work pool.

    register_on_cluster(prefect, pipeline, settings, git="https://git.example.com/team/digits.git")
    reprise deploy --place cluster --render      # the same as a prefect.yaml for stock `prefect deploy`

The pod of a flow knows of the user's machine only what stands here: the text of cluster.toml and the git URL, as
environment, and parameters. Everything else comes out of the image and the project's commit; Prefect pulls no code.
Beside it stand `rollback/<pipeline>` and `ask/<pipeline>`, made when they are first wanted (flows.ask).
Not covered: the pool's job template (deployments/k8s/base/pool.json), a laptop (flows.triggers).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deployments.errors import PreflightError
from flows.cluster_settings import ClusterSettings
from flows.form import form
from flows.on_cluster import GIT_VARIABLE
from flows.place import CLUSTER_VARIABLE
from flows.prefect_api import FLOW, Prefect
from flows.project import Project
from flows.settings import PipelineSettings
from flows.triggers import ENTRYPOINT, HEARTBEAT_SECONDS, OVERLAP, cron_of

PLACE = "cluster"
PULL_STEPS = [{"prefect.deployments.steps.set_working_directory": {"directory": "/app"}}]  # of the flow image


def register_on_cluster(prefect: Prefect, pipeline: PipelineSettings, settings: ClusterSettings, *, git: str) -> str:
    """Create or renew the deployment; returns its id. Raises PreflightError without the pool."""
    _check_pool(prefect, settings)
    flow = prefect.call("POST", "/flows/", {"name": FLOW})
    body = {"flow_id": flow["id"], **cluster_deployment(pipeline, settings, git=git)}
    return str(prefect.call("POST", "/deployments/", body)["id"])


def _check_pool(prefect: Prefect, settings: ClusterSettings) -> None:
    pool = prefect.find(f"/work_pools/{settings.place.work_pool}")
    if pool is None or pool.get("type") != "kubernetes":
        found = "there is none" if pool is None else f"it is of type {pool.get('type')}"
        raise PreflightError(
            f"work pool {settings.place.work_pool!r} of Prefect at {prefect.url}: {found}; expected one of type "
            "kubernetes with our job template: kubectl apply -k deployments/k8s/overlays/NAME makes it"
        )


def register_rollback(prefect: Prefect, pipeline: PipelineSettings, settings: ClusterSettings) -> str:
    """Create or renew the deployment `rollback/<pipeline>`; returns its id. Raises as `register_on_cluster`."""
    more = {
        "description": f"An earlier version of `{pipeline.name}` back in service; empty: the one before.",
        "entrypoint": "flows.rollback_flow.rollback_on_cluster",
        "job_variables": job_variables(pipeline.name, settings, git=""),
        "parameters": {"soak": pipeline.serve.soak, "place": PLACE},
        "concurrency_limit": 1,
        "concurrency_options": {"collision_strategy": "ENQUEUE"},
    }
    return _register_beside(prefect, "rollback", pipeline, settings, more)


def register_ask(prefect: Prefect, pipeline: PipelineSettings, settings: ClusterSettings, *, git: str) -> str:
    """The deployment `ask/<pipeline>`, as `register_rollback`; any number of questions at once. `git`: for plans."""
    more = {
        "description": f"Questions about `{pipeline.name}`: `reprise plan`, `trace`, `who-uses`, `audit`.",
        "entrypoint": "flows.ask_flow.ask_on_cluster",
        "job_variables": job_variables(pipeline.name, settings, git=git),
        "parameters": {"place": PLACE},
    }
    return _register_beside(prefect, "ask", pipeline, settings, more)


def _register_beside(
    prefect: Prefect, flow: str, pipeline: PipelineSettings, settings: ClusterSettings, more: dict[str, Any]
) -> str:
    """A deployment of the pool for another flow than `retrain`."""
    _check_pool(prefect, settings)
    body = {
        "flow_id": prefect.call("POST", "/flows/", {"name": flow})["id"],
        "name": pipeline.name,
        "tags": ["reprise", pipeline.name],
        "pull_steps": PULL_STEPS,
        "work_pool_name": settings.place.work_pool,
        **more,
    }
    return str(prefect.call("POST", "/deployments/", body)["id"])


def cluster_deployment(pipeline: PipelineSettings, settings: ClusterSettings, *, git: str) -> dict[str, Any]:
    """The deployment as Prefect's API takes it."""
    project, schedule = Project(pipeline.folder), pipeline.schedule
    file = project.in_repo(pipeline.file.name)
    inside = pipeline.model_copy(update={"file": Path(file)})
    return {
        "name": pipeline.name,
        "description": f"Retrain `{pipeline.name}` on the cluster: pull, train, register, package, deploy, check. "
        "Whatever is done for the same inputs is reused.",
        "tags": ["reprise", pipeline.name],
        "entrypoint": ENTRYPOINT,
        "pull_steps": PULL_STEPS,
        "work_pool_name": settings.place.work_pool,
        "job_variables": job_variables(pipeline.name, settings, git=git),
        "parameters": {"pipeline": file, "place": PLACE, "rev": schedule.rev},
        "parameter_openapi_schema": form(inside, place=PLACE, revs=["HEAD"]),
        "enforce_parameter_schema": True,
        "schedules": [cron_of(pipeline)] if schedule.cron else [],
        "concurrency_limit": 1,
        "concurrency_options": {"collision_strategy": OVERLAP[schedule.overlap]},
    }


def job_variables(name: str, settings: ClusterSettings, *, git: str) -> dict[str, Any]:
    """What the pool's template is filled with. No secrets: those are named, as for every pod."""
    made: dict[str, Any] = {
        "name": f"flow-{name}",
        "namespace": settings.place.namespace,
        "image_pull_policy": settings.images.pull_policy,
        "state_claim": settings.state.claim,
        "state_mount": settings.state.mount,
        "image_pull_secrets": [{"name": secret} for secret in settings.images.pull_secrets],
        "env_from": [{"secretRef": {"name": secret}} for secret in settings.environment.secrets],
        "env": {
            **settings.environment.values,
            CLUSTER_VARIABLE: settings.text,
            GIT_VARIABLE: git,
            "MLFLOW_TRACKING_URI": settings.services.mlflow,
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        },
    }
    if settings.images.flow:  # else the pool's own
        made["image"] = settings.images.flow
    return made
