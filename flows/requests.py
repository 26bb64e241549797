"""What each step is asked, from the settings, the plan and what the steps before it gave.

Kept apart from flows.retrain so that the order of the pipeline fits one screen. Standard library and settings only.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from deployments.workload import Resources
from flows.cluster_settings import ClusterResources, ClusterSpot, TrainResources
from flows.place_settings import StepResources
from flows.plan import code_files
from flows.project import Project
from flows.run import Run
from flows.settings import PipelineSettings
from tasks.capacity import CapacityPolicy
from tasks.check_endpoint import CheckRequest
from tasks.deploy_model import DeployRequest, Endpoint
from tasks.package_model import PackagedModel, PackageRequest
from tasks.pull_data import PulledData, PullRequest
from tasks.register_model import RegisteredModel, RegisterRequest
from tasks.train_model import TrainedModel, TrainRequest
from tasks.write_report import ReportRequest
from training.spec import CheckpointPolicy, TrainSpec


def pull(run: Run) -> PullRequest:
    """The data at the run's commit."""
    plan, state = run.plan, run.plan.place.state
    project = Project(plan.project)
    return PullRequest(
        repo=str(project.root),
        sha=plan.git_sha,
        path=project.in_repo(plan.pipeline.data.path),
        digest=plan.data.digest,
        cache=str(state / "cache"),
        folder=str(state / "data"),
        train=plan.pipeline.data.train,
        heldout=plan.pipeline.data.heldout,
    )


def train_spec(run: Run, data: PulledData) -> TrainSpec:
    """The spec of a run's training, its code exported."""
    plan = run.plan
    return spec_of(
        plan.pipeline,
        key=plan.steps["train_model"].key,
        store=run.store.path,
        code=exported_code(run),
        code_digest=plan.code_digest,
        data=data.folder,
        data_digest=plan.data.digest,
        mlflow_uri=run.urls["mlflow"],
    )


def spec_of(
    pipeline: PipelineSettings,
    *,
    key: str,
    store: Path,
    code: Path,
    code_digest: str,
    data: str,
    data_digest: str,
    mlflow_uri: str,
) -> TrainSpec:
    """Pure: what decides the weights (the data, the code of the run's commit, [train]), and where things are."""
    settings, folder = pipeline.train, store / "trainings" / key
    policy = settings.checkpoint
    return TrainSpec(
        key=key,
        pipeline=pipeline.name,
        module=str(code / pipeline.model.module),
        data=data,
        train_split=pipeline.data.train,
        heldout_split=pipeline.data.heldout,
        checkpoints=f"file://{folder / 'checkpoints'}",
        output=str(folder / "output"),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        seed=settings.seed,
        shards=settings.shards or settings.workers,
        precision=settings.precision,
        compile=settings.compile,
        parallel=settings.parallel,
        threads=settings.threads,
        profile=settings.profile,
        params=dict(settings.params),
        checkpoint=CheckpointPolicy(
            min_seconds=policy.min_interval,
            max_seconds=policy.max_interval,
            every_steps=policy.every_steps,
            keep=policy.keep,
            mtbf_seconds=policy.mtbf,
            notice_seconds=policy.notice,
        ),
        samples=pipeline.check.samples,
        code_digest=code_digest,
        data_digest=data_digest,
        mlflow_uri=mlflow_uri,
        progress=str(folder / "progress.jsonl"),
    )


def train(run: Run, data: PulledData) -> TrainRequest:
    """The training on that data, and how it is run."""
    plan, settings = run.plan, run.plan.pipeline.train
    spot, resources = plan.place.spot, plan.place.resources.train_model
    return TrainRequest(
        spec=train_spec(run, data),
        experiment=plan.pipeline.name,
        workers=settings.workers,
        nodes=resources.nodes if isinstance(resources, TrainResources) else 1,
        interruptions=settings.interruptions,
        errors=settings.errors,
        deadline_seconds=settings.deadline,
        since=run.document["budget_since"],
        capacity=spot.policy() if isinstance(spot, ClusterSpot) else CapacityPolicy(),
        grace_seconds=spot.grace,
        resources=wanted_of(resources),
        tags={
            "reprise.git_sha": plan.git_sha,
            "reprise.data_digest": plan.data.digest,
            "reprise.code_digest": plan.code_digest,
            "reprise.run": run.id,
        },
    )


def wanted_of(resources: StepResources) -> Resources:
    """What a step asks of its place."""
    if isinstance(resources, ClusterResources):
        return resources.wanted()
    return Resources(cpus=resources.cpus, memory=resources.memory, gpus=resources.gpus, shm=resources.shm or "")


def exported_code(run: Run) -> Path:
    """The user's files at the run's commit, in a folder named by their digest (made if it is not there)."""
    plan, project = run.plan, Project(run.plan.project)
    folder = run.store.path / "code" / plan.code_digest
    project.export_code(plan.git_sha, code_files(plan.pipeline, project), folder)
    return folder / project.prefix


def certificate_path(run: Run) -> Path:
    """Where `reprise verify-resume` leaves the proof for this training."""
    return run.store.path / "trainings" / run.plan.steps["train_model"].key / "certificate.json"


def register(run: Run, data: PulledData, training: TrainedModel, champion: dict[str, Any] | None) -> RegisterRequest:
    """The trained model and its numbers, for the gate and the registry."""
    plan = run.plan
    code, certificate = exported_code(run), certificate_path(run)
    lineage = {
        "git_sha": plan.git_sha,
        "data_digest": plan.data.digest,
        "code_digest": plan.code_digest,
        "run": run.id,
        "attempts": str(training.attempts),
        "interruptions": str(training.interruptions),
        "steps_lost": str(training.steps_lost),
        **{f"key.{s.name}": s.key for s in plan.steps.values() if s.name in ("pull_data", "train_model")},
    }
    return RegisterRequest(
        key=plan.steps["register_model"].key,
        pipeline=plan.pipeline.name,
        tracking_uri=run.urls["mlflow"],
        run_id=training.run_id,
        experiment=plan.pipeline.name,
        weights=training.weights,
        weights_sha256=training.weights_sha256,
        module=str(code / plan.pipeline.model.module),
        files=[str(code / name) for name in plan.pipeline.model.files],
        params=dict(plan.pipeline.train.params),
        metrics=training.metrics,
        heldout=training.heldout,
        heldout_digest=data.heldout_digest,
        champion=champion,
        gate=plan.pipeline.gate.model_dump(),
        lineage=lineage,
        certificate=str(certificate) if certificate.exists() else "",
        lock_folder=str(run.store.path),
    )


def package(run: Run, model: RegisteredModel, training: TrainedModel) -> PackageRequest:
    """The registered version as an archive for the model server."""
    plan, code = run.plan, exported_code(run)
    return PackageRequest(
        key=plan.steps["package_model"].key,
        pipeline=plan.pipeline.name,
        version=model.version,
        weights=training.weights,
        weights_sha256=training.weights_sha256,
        module=str(code / plan.pipeline.model.module),
        files=[str(code / name) for name in plan.pipeline.model.files],
        params=dict(plan.pipeline.train.params),
        serve=serve_settings(run),
        model_store=str(run.store.path / "models"),
    )


def serve_settings(run: Run) -> dict[str, Any]:
    """[serve] in the model server's terms. Seconds."""
    serve = run.plan.pipeline.serve
    return {
        "batch_size": serve.batch_size,
        "max_batch_delay_seconds": serve.max_batch_delay,
        "workers": serve.workers,
        "response_timeout_seconds": serve.response_timeout,
        "queue": serve.queue,
    }


def deploy(run: Run, model: RegisteredModel, archive: PackagedModel, training: TrainedModel) -> DeployRequest:
    """The archive into service."""
    plan, serve = run.plan, run.plan.pipeline.serve
    return DeployRequest(
        key=plan.steps["deploy_model"].key,
        pipeline=plan.pipeline.name,
        version=model.version,
        label=archive.label,
        mar=archive.mar,
        sha256=archive.sha256,
        management_url=run.urls["management"],
        inference_url=run.urls["inference"],
        serve=serve_settings(run),
        golden=training.heldout,
        golden_count=serve.golden,
        soak_seconds=serve.soak,
        admission=serve.admission,
        canary_samples=serve.canary_samples,
        max_p95_seconds=plan.pipeline.check.max_p95,
        server_logs="" if plan.place.target else str(plan.place.state / "services" / "torchserve" / "logs"),
        tracking_uri=run.urls["mlflow"],
        record=str(run.store.path / "endpoints"),
        cluster=plan.place.target,
    )


def check(run: Run, endpoint: Endpoint, training: TrainedModel) -> CheckRequest:
    """The endpoint against the trained model, sample by sample."""
    settings = run.plan.pipeline.check
    return CheckRequest(
        url=endpoint.url,
        pipeline=run.plan.pipeline.name,
        version=endpoint.version,
        heldout=training.heldout,
        min_agreement=settings.min_agreement,
        max_p95_seconds=settings.max_p95,
        samples=settings.samples,
    )


def report(run: Run, training: TrainedModel) -> ReportRequest:
    """The page about this run, from what its steps gave so far."""
    champion, checked = run.results.get("champion"), run.results.get("check_endpoint")
    evaluation: dict[str, Any] = {"candidate": training.metrics, "champion": (champion or {}).get("metrics")}
    if champion:
        evaluation["champion_version"] = champion["version"]
    if checked:
        evaluation["check"] = {k: v for k, v in asdict(checked).items() if k != "disagreements"}
    return ReportRequest(
        document=run.document,
        progress=training.progress,
        evaluation=evaluation,
        heldout=training.heldout,
        html=str(run.store.path / "reports" / f"{run.id}.html"),
        tracking_uri=run.urls["mlflow"],
        run_id=training.run_id,
    )
