"""What a run would do and why, computed before anything heavy is imported and before anything is started.

Each step's key is a digest over its inputs, so the plan of a run at (git sha, DVC digest, parameters) is known from git
alone: `reprise plan` prints it, `reprise run` executes it. Not covered: executing (flows.retrain), printing
(flows.display).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.place import Place
from flows.project import DataPointer, Project
from flows.settings import PipelineSettings
from tasks.records import StepRecord, Store, step_key

# What a step does, as a number that its author raises when the same inputs should give another result.
VERSIONS = {
    "pull_data": "1",
    "train_model": "1",
    "register_model": "1",
    "package_model": "1",
    "deploy_model": "1",
    "check_endpoint": "1",
}
STEPS = tuple(VERSIONS)
ROLLOUT = {
    "golden",
    "soak",
    "admission",
    "canary_samples",
}  # of [serve]: how a version gets into service, not what it is


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One step of a run: what it depends on, and whether its work is done already."""

    name: str
    key: str
    inputs: dict[str, Any]  # what the key is made of
    reused: bool
    reason: str  # one sentence: what is unchanged, or what changed
    record: StepRecord | None = None  # of the finished work


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run before it starts."""

    pipeline: PipelineSettings
    place: Place
    project: Path
    git_sha: str
    data: DataPointer
    code_digest: str
    steps: dict[str, PlannedStep]

    @property
    def unchanged(self) -> bool:
        """Nothing would run."""
        return all(s.reused for s in self.steps.values())


@dataclass(frozen=True, kw_only=True)
class StepKeys:
    """What a commit, its data and its settings make of every step."""

    data: DataPointer
    code_digest: str
    steps: dict[str, tuple[str, dict[str, Any]]]  # step -> its key and the inputs that it is made of


def step_keys(pipeline: PipelineSettings, project: Project, git_sha: str) -> StepKeys:
    """From git alone: what is done does not matter. Raises the errors of `Project` for data and code."""
    with pipeline.blaming("data", "path"):
        data_path = project.in_repo(pipeline.data.path)
        data = project.data_pointer(git_sha, data_path)
    with pipeline.blaming("model", "files"):
        code = project.code_digest(git_sha, code_files(pipeline, project))
    train = pipeline.train
    inputs: dict[str, dict[str, Any]] = {
        "pull_data": {"data": data.digest, "path": data_path},
        "train_model": {
            "code": code,
            "train": train.deciding(),
            "splits": [pipeline.data.train, pipeline.data.heldout],
        },
        "register_model": {"gate": pipeline.gate.model_dump(), "name": pipeline.name},
        "package_model": {"serve": pipeline.serve.model_dump(exclude=ROLLOUT), "handler": _handler_digest()},
        "deploy_model": {"rollout": pipeline.serve.model_dump(include=ROLLOUT)},
        "check_endpoint": {"check": pipeline.check.model_dump()},
    }
    steps: dict[str, tuple[str, dict[str, Any]]] = {}
    above: dict[str, Any] = {}
    for name in STEPS:
        own = {**inputs[name], **above}
        key = step_key(name, VERSIONS[name], own)
        steps[name], above = (key, own), {name: key}
    return StepKeys(data=data, code_digest=code, steps=steps)


def make_plan(pipeline: PipelineSettings, place: Place, project: Project, store: Store, git_sha: str) -> Plan:
    """Compute every step key and look up what is done. Raises the errors of `Project` for data and code."""
    keys = step_keys(pipeline, project, git_sha)
    last = store.read(f"pipelines/{pipeline.name}") or {}
    steps: dict[str, PlannedStep] = {}
    upstream: PlannedStep | None = None
    for name, (key, own) in keys.steps.items():
        record = store.step(key)
        missing = _effect_missing(name, record, pipeline, place) if record else ""
        reused = record is not None and not missing and (upstream is None or upstream.reused or name == "train_model")
        reason = _reason(name, own, record, reused, missing, upstream, store.step(last.get(name, "")))
        upstream = steps[name] = PlannedStep(
            name=name, key=key, inputs=own, reused=reused, reason=reason, record=record if reused else None
        )
    return Plan(
        pipeline=pipeline,
        place=place,
        project=project.folder,
        git_sha=git_sha,
        data=keys.data,
        code_digest=keys.code_digest,
        steps=_needless_pull(steps),
    )


def code_files(pipeline: PipelineSettings, project: Project) -> list[str]:
    """The user's files that travel with the model, as paths in the repository."""
    return [project.in_repo(name) for name in (pipeline.model.module, *pipeline.model.files)]


def _needless_pull(steps: dict[str, PlannedStep]) -> dict[str, PlannedStep]:
    """Data that a finished training has already used need not be pulled again."""
    pull = steps["pull_data"]
    if pull.reused or not all(s.reused for n, s in steps.items() if n != "pull_data"):
        return steps
    return {
        **steps,
        "pull_data": PlannedStep(**{**vars(pull), "reused": True, "reason": "not needed: its training is done"}),
    }


def _effect_missing(name: str, record: StepRecord, pipeline: PipelineSettings, place: Place) -> str:
    """Why a finished step's effect does not stand any more; empty if it does. Cheap looks only."""
    result = record.result
    if name == "pull_data" and not Path(result["folder"]).is_dir():
        return "the pulled data is gone"
    if name == "train_model" and not Path(result["weights"]).is_file():
        return "the weights are gone"
    if name == "package_model" and not Path(result["mar"]).is_file():
        return "the .mar is gone"
    if name == "deploy_model":
        return _served_otherwise(pipeline.name, result["label"], place)
    return ""


def _served_otherwise(pipeline: str, label: str, place: Place) -> str:
    """Why this label is not the one in service; empty if it is. Asks the server: the record alone proves nothing."""
    served = place.in_service(pipeline)
    if not served:
        return "nothing is in service"
    return "" if served == label else f"version {served} is in service"


def _handler_digest() -> str:
    """Of the code that Reprise puts into every .mar."""
    handler = Path(__file__).resolve().parent.parent / "deployments" / "torchserve" / "handler.py"
    return hashlib.sha256(handler.read_bytes()).hexdigest()


def _reason(
    name: str,
    inputs: dict[str, Any],
    record: StepRecord | None,
    reused: bool,
    missing: str,
    upstream: PlannedStep | None,
    last: StepRecord | None,
) -> str:
    if reused:
        return "unchanged: " + ", ".join(f"{k} {_short(v)}" for k, v in inputs.items())
    if missing:
        return missing
    if record is not None and upstream is not None:
        return f"{upstream.name} runs"
    if last is None:
        return "first time"
    changed = [f"{k} {_short(last.inputs.get(k))} -> {_short(v)}" for k, v in inputs.items() if last.inputs.get(k) != v]
    return "changed: " + ", ".join(changed) if changed else f"a new version of {name}"


def _short(value: Any) -> str:
    """A digest's first digits; a structure's own digest."""
    if isinstance(value, str) and len(value) >= 12 and all(c in "0123456789abcdef." or c in "dir" for c in value):
        return value[:7]
    return str(value) if isinstance(value, (str, int, float)) else step_key("", "", {"": value})[:7]
