"""A pipeline registered with Prefect: its schedule, its parameter form, one run at a time, a watch for the dead.

    reprise deploy                      # again after each change of [schedule] or of [train]
    reprise deploy --render             # the same as a prefect.yaml for stock `prefect deploy`

On a laptop runs are started by a worker of the process pool `reprise-laptop` (flows.serve), on a cluster by that of its
Kubernetes pool (flows.cluster_deployment). A run that is late, because no worker
ran, starts when one does; runs that a sleeping server missed are not made up for. Not covered: git pushes
(flows.push_receiver), the flow itself (flows.retrain).
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError
from flows.cluster_settings import ClusterSettings, load_cluster
from flows.fetch import branches, origin_url
from flows.form import form
from flows.place_settings import kind_of, read_place
from flows.prefect_api import FLOW, Prefect
from flows.project import Project
from flows.services import service_urls
from flows.settings import PipelineSettings, PlaceSettings, load_place
from flows.zombies import SILENCE

ENTRYPOINT = "flows.retrain.retrain"
HEARTBEAT_SECONDS = 30  # the least that Prefect takes
SILENCE_SECONDS = 3 * HEARTBEAT_SECONDS
AUTOMATION = "reprise: a flow without heartbeat has crashed"
OVERLAP = {"wait": "ENQUEUE", "skip": "CANCEL_NEW"}


def any_place(place: str, folder: Path) -> PlaceSettings | ClusterSettings:
    """The settings of a place of either kind, as seen from the project folder. Raises ConfigError."""
    cluster = kind_of(read_place(place, folder)[1]) == "cluster"
    return load_cluster(place, folder) if cluster else load_place(place, folder)


def prefect_of(place: PlaceSettings | ClusterSettings) -> Prefect:
    """A place's server, as this process reaches it: of a cluster $PREFECT_API_URL counts first, which its pods have."""
    if not isinstance(place, ClusterSettings):
        return Prefect(url=service_urls(place)["prefect"])
    given = os.environ.get("PREFECT_API_URL", "").rstrip("/").removesuffix("/api")
    return Prefect(url=given or place.services.prefect_outside or place.services.prefect)


def pool_name(place: PlaceSettings | ClusterSettings) -> str:
    """The work pool whose worker runs a place's flows."""
    return place.place.work_pool if isinstance(place, ClusterSettings) else f"reprise-{place.kind}"


def register(pipeline: PipelineSettings, place: PlaceSettings | ClusterSettings) -> str:
    """Create or renew the deployment `retrain/<pipeline>` and the watch; returns its id. Raises TryAgain without a
    server, PreflightError for a cluster without its pool."""
    prefect = prefect_of(place)
    if isinstance(place, ClusterSettings):
        from flows.cluster_deployment import register_on_cluster

        made = register_on_cluster(prefect, pipeline, place, git=_git_url(pipeline, place))
        install_automation(prefect)
        return made
    if prefect.find(f"/work_pools/{pool_name(place)}") is None:
        # Its worker fills in the template of the process type when it starts.
        prefect.call("POST", "/work_pools/", {"name": pool_name(place), "type": "process", "base_job_template": {}})
    flow = prefect.call("POST", "/flows/", {"name": FLOW})
    renewed = prefect.call("POST", "/deployments/", {"flow_id": flow["id"], **deployment(pipeline, place)})
    install_automation(prefect)
    return str(renewed["id"])


def _git_url(pipeline: PipelineSettings, place: ClusterSettings) -> str:
    """Where a pod clones from. Raises ConfigError if nobody says it."""
    url = place.project.git or origin_url(Project(pipeline.folder))
    if not url:
        raise ConfigError(
            f"{place.file}: [project] git is not set and {pipeline.folder} has no remote `origin`; a flow's pod clones "
            "the project: git remote add origin URL"
        )
    return url


def cron_of(pipeline: PipelineSettings) -> dict[str, Any]:
    """[schedule] as Prefect's API takes it, for a deployment on any place."""
    schedule = pipeline.schedule
    return {
        "slug": "cron",
        "schedule": {"cron": schedule.cron, "timezone": schedule.timezone},
        "active": not schedule.paused,
        "parameters": {"rev": schedule.rev, "cause": "schedule"},
    }


def described(pipeline: PipelineSettings) -> str:
    """What a person reads on the deployment's page."""
    schedule, end = pipeline.schedule, "a new version goes into service if the gate accepts it"
    if pipeline.deploy.approval:
        end += " and a person approves"
    paused = " (paused)" if schedule.paused else ""
    when = f"by itself at `{schedule.cron}` {schedule.timezone}{paused}" if schedule.cron else "on demand"
    return (
        f"Retrains **{pipeline.name}** {when}, at `{schedule.rev}`: pull, train, register, package, deploy, check. "
        f"Whatever is done for the same inputs is reused; {end}.\n\n"
        "**Cancel** stops the trainer with a checkpoint, **Retry** goes on there."
    )


def deployment(pipeline: PipelineSettings, place: PlaceSettings) -> dict[str, Any]:
    """The deployment as Prefect's API takes it."""
    schedule, folder = pipeline.schedule, str(pipeline.folder)
    return {
        "name": pipeline.name,
        "description": described(pipeline),
        "tags": ["reprise", pipeline.name],
        "entrypoint": ENTRYPOINT,
        # Not `path`: Prefect would copy that whole folder at every run.
        "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": folder}}],
        "work_pool_name": pool_name(place),
        "job_variables": {
            # -P: a folder of the user's that is called flows must not be taken for ours.
            "command": f"{shlex.quote(sys.executable)} -P -m prefect.engine",
            "working_dir": folder,
            "env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)},
        },
        # The revision too: Prefect's Quick run takes these, not the form's defaults.
        "parameters": {"pipeline": str(pipeline.file), "place": _place_name(place), "rev": schedule.rev},
        "parameter_openapi_schema": form(
            pipeline, place=_place_name(place), revs=["HEAD", *branches(Project(pipeline.folder))]
        ),
        "enforce_parameter_schema": True,
        "schedules": [cron_of(pipeline)] if schedule.cron else [],
        "concurrency_limit": 1,
        "concurrency_options": {"collision_strategy": OVERLAP[schedule.overlap]},
    }


def _place_name(place: PlaceSettings) -> str:
    """As `load_place` takes it."""
    shipped_or_beside = place.file.name == f"{place.kind}.toml"
    return place.kind if shipped_or_beside else str(place.file)


def install_automation(prefect: Prefect) -> None:
    """A run whose process vanished with its machine stays Running; Prefect marks it once its heartbeats stop."""
    wanted = {"automations": {"name": {"any_": [AUTOMATION]}}}
    found = prefect.call("POST", "/automations/filter", wanted)
    ends = ("Completed", "Failed", "Cancelled", "Crashed", "Suspended", "Paused", "AwaitingRetry", "Superseded")
    body = {
        "name": AUTOMATION,
        "description": f"No heartbeat for {SILENCE_SECONDS} s. `reprise serve`, or flow-watch, resumes it once.",
        "enabled": True,
        "trigger": {
            "type": "event",
            "posture": "Proactive",
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "match_related": {"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.reprise"},
            "for_each": ["prefect.resource.id"],
            "after": ["prefect.flow-run.heartbeat"],
            "expect": ["prefect.flow-run.heartbeat", *(f"prefect.flow-run.{name}" for name in ends)],
            "threshold": 1,
            "within": SILENCE_SECONDS,
        },
        "actions": [
            {
                "type": "change-flow-run-state",
                "state": "CRASHED",
                "name": "Crashed",
                "message": f"{SILENCE} {SILENCE_SECONDS} s: its process is gone.",
            }
        ],
    }
    if found:
        prefect.call("PUT", f"/automations/{found[0]['id']}", body)
    else:
        prefect.call("POST", "/automations/", body)


def render(pipeline: PipelineSettings, place: PlaceSettings | ClusterSettings) -> str:
    """The prefect.yaml of this pipeline, for `prefect deploy --prefect-file FILE --all`."""
    import yaml

    if isinstance(place, ClusterSettings):
        from flows.cluster_deployment import cluster_deployment

        made = cluster_deployment(pipeline, place, git=_git_url(pipeline, place))
    else:
        made = deployment(pipeline, place)
    schedules = [
        {
            "cron": s["schedule"]["cron"],
            "timezone": s["schedule"]["timezone"],
            "active": s["active"],
            "slug": s["slug"],
            "parameters": s["parameters"],
        }
        for s in made["schedules"]
    ]
    document = {
        "name": "reprise",
        "pull": made["pull_steps"],
        "deployments": [
            {
                "name": made["name"],
                "description": made["description"],
                "tags": made["tags"],
                "entrypoint": ENTRYPOINT,
                "parameters": made["parameters"],
                "schedules": schedules,
                "concurrency_limit": {"limit": 1, **made["concurrency_options"]},
                "work_pool": {"name": made["work_pool_name"], "job_variables": made["job_variables"]},
            }
        ],
    }
    return str(yaml.safe_dump(document, sort_keys=False, width=120))
