"""A finished training becomes exactly one MLflow model version, with the gate's decision and its lineage on it.

Run by hand: `python -m tasks.step register_model request.json result.json`. MLflow makes as many versions as it is
asked for, so the lookup (by step key, else by training and weights) and the creation happen under one lock of the
store, and the version is created with all of its tags in one call. What is killed in between is found again: the files
are uploaded first with MLmodel last, so a folder with an MLmodel of the same digests is whole and not uploaded twice.
A refused model is registered too, without an alias, so that the decision stays on record.
Not covered: the alias `champion`, which moves with the endpoint in deploy_model's transaction; metrics during training.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.errors import ConfigError, GateRefused, GiveUp
from tasks.gate import Decision, Gate, decide, is_finite
from tasks.records import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

# A name that MLflow, Kubernetes (as a DNS label, with a suffix) and TorchServe all take.
NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
FOLDER = "model"
LOCK_SECONDS = 300.0  # an upload of some gigabytes by somebody else


@dataclass(frozen=True, kw_only=True)
class RegisterRequest:
    """A complete training and the rules it is judged by. Paths are local files."""

    key: str  # this step's key
    pipeline: str  # the registered model's name
    tracking_uri: str
    run_id: str  # the MLflow run of the training
    experiment: str = ""  # its experiment's name; checked when given
    weights: str
    weights_sha256: str
    module: str
    files: list[str] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # the candidate's, held-out
    heldout: str  # heldout.jsonl
    heldout_digest: str
    champion: dict[str, Any] | None = None  # {"version", "metrics", "heldout_digest"}
    gate: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, str] = field(default_factory=dict)  # git_sha, data_digest, run, attempts, key.STEP...
    certificate: str = ""  # JSON file of the resume proof
    lock_folder: str  # root of the store


@dataclass(frozen=True, kw_only=True)
class RegisteredModel:
    """The model version that this training is."""

    version: str
    run_id: str
    accepted: bool
    decision: dict[str, Any]  # tasks.gate.Decision
    run_url: str
    model_url: str
    source: str  # artifact URI of the model's folder
    created: bool = True  # False: the version was there already


def register_model(request: RegisterRequest) -> RegisteredModel:
    """Register once, decide once. Raises GateRefused with the numbers, TryAgain when MLflow or the lock is away."""
    from tasks.mlflow_server import connect, model_url, run_url, told

    gate = Gate.read(request.gate)
    _check(request)
    certificate = _read_certificate(request.certificate)
    client = connect(request.tracking_uri)
    lock = Store(root=request.lock_folder).lock(f"register-{request.pipeline}", wait_seconds=LOCK_SECONDS)
    with lock, told(request.tracking_uri, f"registering {request.pipeline}"):
        run = client.get_run(request.run_id)
        _check_experiment(client, run, request)
        version = find_version(client, request)
        created = version is None
        if version is not None and _decided_on_the_same(version, request):
            decision = Decision(**json.loads(version.tags["reprise.decision"]))
        else:
            decision = decide(
                gate=gate,
                metrics=request.metrics,
                heldout_digest=request.heldout_digest,
                champion=request.champion,
                certificate=certificate,
                training_keys=(request.lineage.get("key.train_model", ""), request.key),
                weights_sha256=request.weights_sha256,
            )
            version = _record(client, run, request, version, decision)
        number = str(version.version)
        _set_candidate(client, request.pipeline, number, accepted=decision.accepted)
    if not decision.accepted:
        raise GateRefused(f"{request.pipeline} version {number} may not serve: {'; '.join(decision.refusals)}")
    return RegisteredModel(
        version=number,
        run_id=request.run_id,
        accepted=True,
        decision=asdict(decision),
        run_url=run_url(request.tracking_uri, run.info.experiment_id, request.run_id),
        model_url=model_url(request.tracking_uri, request.pipeline, number),
        source=str(version.source),
        created=created,
    )


def find_version(client: MlflowClient, request: RegisterRequest) -> ModelVersion | None:
    """The version of this step key, else the one of this training and these weights, else None."""
    by_key = f"name = '{request.pipeline}' and tags.`reprise.step_key` = '{request.key}'"
    by_run = f"name = '{request.pipeline}' and run_id = '{request.run_id}'"
    for query in (by_key, by_run):
        found = [
            v
            for v in client.search_model_versions(query)
            if v.tags.get("reprise.weights_sha256") == request.weights_sha256
        ]
        if found:
            return min(found, key=lambda v: int(v.version))
    return None


def upload(client: MlflowClient, run: Run, request: RegisterRequest) -> str:
    """Put the model's folder beside the run, once; returns its artifact URI. Only under the lock."""
    from tasks.model_folder import collect, write_folder

    sources = collect(
        weights=Path(request.weights),
        weights_sha256=request.weights_sha256,
        module=Path(request.module),
        files=[Path(f) for f in request.files],
        heldout=Path(request.heldout),
        certificate=Path(request.certificate) if request.certificate else None,
    )
    # In the store and of a fixed name: what a kill leaves there, gigabytes perhaps, goes with the next try.
    folder = Store(root=request.lock_folder).path / "scratch" / f"register-{request.pipeline}" / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    digests = write_folder(
        folder, sources, module=Path(request.module).name, params=request.params, run_id=request.run_id
    )
    if not _is_whole(client, request.run_id, digests):
        for path in sorted(folder.iterdir(), key=lambda p: (p.name == "MLmodel", p.name)):
            client.log_artifact(request.run_id, str(path), FOLDER)
    shutil.rmtree(folder)
    return f"{run.info.artifact_uri.rstrip('/')}/{FOLDER}"


def _is_whole(client: MlflowClient, run_id: str, digests: dict[str, str]) -> bool:
    """Whether an earlier try uploaded this very folder to its end: MLmodel, the last file, tells of the same bytes."""
    from tasks.model_folder import digests_of

    there = {Path(item.path).name for item in client.list_artifacts(run_id, FOLDER)}
    if not there.issuperset({"MLmodel", *digests}):
        return False
    with tempfile.TemporaryDirectory(prefix="reprise-mlmodel-") as scratch:
        text = Path(client.download_artifacts(run_id, f"{FOLDER}/MLmodel", scratch)).read_text()
    return digests_of(text) == digests


def log_once(client: MlflowClient, run: Run, request: RegisterRequest) -> None:
    """Params, held-out metrics (under the trainer's names) and lineage on its run; what it wrote there stands."""
    from mlflow.entities import Metric, Param, RunTag

    now = int(run.info.start_time or 0)
    values = {f"heldout_{name}": value for name, value in request.metrics.items()}
    metrics = [Metric(k, float(v), now, 0) for k, v in values.items() if is_finite(v) and k not in run.data.metrics]
    params = [Param(k, str(v)) for k, v in request.params.items() if k not in run.data.params]
    tags = [RunTag(f"reprise.{k}", str(v)) for k, v in request.lineage.items()]
    client.log_batch(request.run_id, metrics=metrics, tags=tags)
    for first in range(0, len(params), 100):  # MLflow takes a hundred at once
        client.log_batch(request.run_id, params=params[first : first + 100])


def _check(request: RegisterRequest) -> None:
    if len(request.pipeline) > 40 or not NAME.fullmatch(request.pipeline):
        raise ConfigError(
            f"pipeline.name = {request.pipeline!r}: expected at most 40 of a-z, 0-9 and '-', beginning with a letter "
            "and not ending in '-', so that MLflow, Kubernetes and TorchServe all take it"
        )
    for name, value, shape in (
        ("key", request.key, r"[0-9a-f]{8,64}"),
        ("run_id", request.run_id, r"[0-9a-f]{32}"),
    ):
        if not re.fullmatch(shape, value):  # they go into a search expression
            raise GiveUp(f"register_model.{name} = {value!r}: expected hexadecimal digits ({shape})")


def _check_experiment(client: MlflowClient, run: Run, request: RegisterRequest) -> None:
    if request.experiment and (found := client.get_experiment(run.info.experiment_id).name) != request.experiment:
        raise GiveUp(f"MLflow run {request.run_id} is in experiment {found!r}; expected {request.experiment!r}")


def _decided_on_the_same(version: ModelVersion, request: RegisterRequest) -> bool:
    """Whether the decision is about this key and this proof: a certificate made since is new evidence."""
    known = (version.tags.get("reprise.step_key"), version.tags.get("reprise.resume_certificate", ""))
    return known == (request.key, _certificate_digest(request.certificate))


def _certificate_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def _read_certificate(path: str) -> dict[str, Any] | None:
    if not path:
        return None
    try:
        raw = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise GiveUp(f"{path}: the resume certificate cannot be read ({error}); run `reprise verify-resume`") from error
    if not isinstance(raw, dict):
        raise GiveUp(f"{path}: expected the JSON object that `reprise verify-resume` writes, got {type(raw).__name__}")
    if "uninterrupted" in raw:  # the proof itself (training.verify_resume): what the gate wants to know of it
        weights = raw["uninterrupted"].get("weights_sha256")
        return {"key": raw["key"], "weights_sha256": weights, "identical": raw["equal"] and raw["kills"] > 0}
    return raw


def _tags(request: RegisterRequest, decision: Decision) -> dict[str, str]:
    """All that a version must carry to be found and traced; given at creation, so that no version is without."""
    return {
        **{f"reprise.{name}": str(value) for name, value in request.lineage.items()},
        "reprise.step_key": request.key,
        "reprise.resume_certificate": _certificate_digest(request.certificate),
        "reprise.weights_sha256": request.weights_sha256,
        "reprise.heldout_digest": request.heldout_digest,
        "reprise.gate": "accepted" if decision.accepted else "refused",
        "reprise.decision": json.dumps(asdict(decision), sort_keys=True),
    }


def _description(request: RegisterRequest, decision: Decision) -> str:
    """What a person reads on the version's page (MLflow shows Markdown)."""
    told = [f"**{'Accepted' if decision.accepted else 'Refused'}** by the gate:", ""]
    told += [f"- {sentence}" for sentence in decision.sentences]
    told += [
        "",
        *(f"- {name.replace('_', ' ')}: `{value}`" for name, value in sorted(request.lineage.items())),
    ]
    return "\n".join([*told, f"- weights sha256: `{request.weights_sha256}`"])


def _record(
    client: MlflowClient,
    run: Run,
    request: RegisterRequest,
    version: ModelVersion | None,
    decision: Decision,
) -> ModelVersion:
    """The decision on a new version; or, for the same training under other rules, on the version that it has."""
    from mlflow.exceptions import MlflowException

    tags, description = _tags(request, decision), _description(request, decision)
    if version is not None:
        if request.certificate:
            client.log_artifact(request.run_id, request.certificate, "resume_certificate")
        # The step key last: a version that carries it carries the decision too.
        for name in sorted(tags, key=lambda name: name == "reprise.step_key"):
            client.set_model_version_tag(request.pipeline, version.version, name, tags[name])
        return client.update_model_version(request.pipeline, version.version, description)
    source = upload(client, run, request)
    log_once(client, run, request)
    try:
        client.create_registered_model(request.pipeline, {"reprise.pipeline": request.pipeline})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(
        name=request.pipeline,
        source=source,
        run_id=request.run_id,
        tags=tags,
        description=description,
    )


def _set_candidate(client: MlflowClient, name: str, version: str, *, accepted: bool) -> None:
    """The alias `candidate` is on the newest accepted version, and never on a refused one."""
    present = client.get_registered_model(name).aliases.get("candidate")
    if accepted and (present is None or int(present) < int(version)):
        client.set_registered_model_alias(name, "candidate", version)
    elif not accepted and present is not None and int(present) == int(version):
        client.delete_registered_model_alias(name, "candidate")
