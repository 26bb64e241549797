"""`reprise render`: the objects that a run of this commit would create on a cluster, as YAML for `kubectl apply -f -`.

    reprise render --place cluster [--step train_model]

Pure: the same commit and the same cluster.toml give the same text, on every machine. The training is complete. What a
step is asked holds what a plan knows (key, digests, settings); the rest is the results of the steps before it, which
the flow adds when it creates the Job. After the deploying step come the objects that it applies. With --server the API
server says whether it would take them. Not covered: creating them (deployments.cluster), what lives long
(deployments/k8s).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.cluster_place import ClusterPlace
from deployments.errors import ConfigError
from deployments.manifests import manifest, yaml_of
from deployments.pod_template import Manifest
from deployments.serving_manifests import Serving, serving_objects
from deployments.workload import Resources, Workload
from flows.cluster_settings import ClusterSettings
from flows.plan import STEPS, StepKeys, step_keys
from flows.project import Project
from flows.requests import spec_of
from flows.settings import PipelineSettings
from flows.settings_errors import did_you_mean
from tasks.train_model import TrainRequest, attempt_workload, first_attempt

RENDERED = (*STEPS, "write_report")
VERSION, NO_DIGEST = "1", "0" * 64  # what register_model and package_model will give is not known yet


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """A pipeline at a commit, on a cluster."""

    pipeline: PipelineSettings
    cluster: ClusterSettings
    sha: str
    prefix: str  # of the project folder in its repository
    data_path: str  # from the repository's root
    keys: StepKeys

    @property
    def state(self) -> Path:
        """The state volume, as pods see it."""
        return Path(self.cluster.state.mount)

    @property
    def run(self) -> str:
        """Stands for the run's id."""
        return f"{self.pipeline.name}-1"


def rendering(pipeline: PipelineSettings, cluster: ClusterSettings, project: Project, sha: str) -> Rendering:
    """Read what the commit says. Raises ConfigError or PreflightError for data and code that are not there."""
    return Rendering(
        pipeline=pipeline,
        cluster=cluster,
        sha=sha,
        prefix=project.prefix,
        data_path=project.in_repo(pipeline.data.path),
        keys=step_keys(pipeline, project, sha),
    )


def render_run(asked: Rendering, step: str = "") -> str:
    """The YAML of all steps in their order, or of one. Raises ConfigError for a step that is none."""
    objects, place = objects_of_run(asked, step), asked.cluster.cluster_place()
    return (
        f"# {asked.pipeline.name} at {asked.sha[:12]}, data {asked.keys.data.digest[:12]}, "
        f"namespace {place.namespace}\n"
        "# A step's request holds what the plan knows; a run adds the results of the steps before it. Model version\n"
        f"# {VERSION}, run {asked.run} and the archive's digest 000... stand for what the run will have.\n"
        f"{yaml_of(objects)}"
    )


def objects_of_run(asked: Rendering, step: str = "") -> list[Manifest]:
    """The objects themselves. Raises ConfigError for a step that is none."""
    if step and step not in RENDERED:
        raise ConfigError(
            f"--step {step}: no step{did_you_mean(step, RENDERED)}; expected one of: {', '.join(RENDERED)}"
        )
    place = asked.cluster.cluster_place()
    return [made for name in ([step] if step else RENDERED) for made in _objects(asked, name, place)]


def _objects(asked: Rendering, step: str, place: ClusterPlace) -> list[Manifest]:
    if step == "deploy_model":
        return [manifest(_step(asked, step), place), *serving_objects(_serving(asked), place)]
    return [manifest(_training(asked) if step == "train_model" else _step(asked, step), place)]


def _resources(asked: Rendering, step: str) -> Resources:
    return asked.cluster.resources.by_step()[step]


def _training(asked: Rendering) -> Workload:
    train, keys = asked.pipeline.train, asked.keys
    store = asked.state / "store"
    spec = spec_of(
        asked.pipeline,
        key=keys.steps["train_model"][0],
        store=store,
        code=store / "code" / keys.code_digest / asked.prefix,
        code_digest=keys.code_digest,
        data=str(asked.state / "data" / keys.data.digest),
        data_digest=keys.data.digest,
        mlflow_uri=asked.cluster.services.mlflow,
    )
    request = TrainRequest(
        spec=spec,
        experiment=asked.pipeline.name,
        workers=train.workers,
        nodes=asked.cluster.resources.train_model.nodes,
        deadline_seconds=train.deadline,
        capacity=asked.cluster.spot.policy(),
        grace_seconds=asked.cluster.spot.grace,
        resources=_resources(asked, "train_model"),
    )
    return attempt_workload(request, spec, [first_attempt(request, now=0.0)])


def _step(asked: Rendering, step: str) -> Workload:
    key = asked.keys.steps[step][0][:12] if step in asked.keys.steps else ""
    number = asked.run.rpartition("-")[2]
    return Workload(
        name=f"{step.replace('_', '-')}-{f'{key}-{number}' if key else asked.run}",
        image="step",
        command=("python", "-m", "tasks.step", step, "{request}", "{result}"),
        request=_known(asked, step),
        resources=_resources(asked, step),
        account="deploy" if step == "deploy_model" else "",
        labels={"run": asked.run, "pipeline": asked.pipeline.name, "step": step, "key": key},
    )


def _known(asked: Rendering, step: str) -> dict[str, Any]:
    pipeline = asked.pipeline
    known: dict[str, Any] = {"pipeline": pipeline.name, "tracking_uri": asked.cluster.services.mlflow}
    if step == "pull_data":
        return {
            "sha": asked.sha,
            "path": asked.data_path,
            "digest": asked.keys.data.digest,
            "cache": str(asked.state / "cache"),
            "folder": str(asked.state / "data"),
            "train": pipeline.data.train,
            "heldout": pipeline.data.heldout,
        }
    if step == "register_model":
        return {**known, "key": asked.keys.steps[step][0], "gate": pipeline.gate.model_dump()}
    if step == "deploy_model":
        return {"pipeline": pipeline.name, "key": asked.keys.steps[step][0]}
    if step == "package_model":
        models = str(asked.state / "store" / "models")
        return {"pipeline": pipeline.name, "key": asked.keys.steps[step][0], "model_store": models}
    if step == "check_endpoint":
        url = f"http://{_serving(asked).name}.{asked.cluster.place.namespace}:8080/predictions/{pipeline.name}"
        return {"pipeline": pipeline.name, "url": url, **pipeline.check.model_dump()}
    return {"tracking_uri": asked.cluster.services.mlflow}


def _serving(asked: Rendering) -> Serving:
    pipeline, store = asked.pipeline, asked.state / "store"
    label = f"{VERSION}.{asked.keys.steps['package_model'][0][:8]}"
    training = store / "trainings" / asked.keys.steps["train_model"][0]
    return Serving(
        pipeline=pipeline.name,
        version=VERSION,
        label=label,
        mar=str(store / "models" / f"{pipeline.name}-{label}.mar"),
        sha256=NO_DIGEST,
        golden=str(training / "output" / "heldout.jsonl"),
        golden_count=pipeline.serve.golden,
        replicas=asked.cluster.serving.replicas,
        resources=_resources(asked, "serve"),
        response_timeout=pipeline.serve.response_timeout,
        soak_seconds=pipeline.serve.soak,
    )
