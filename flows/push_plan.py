"""What a push asks for, decided by what it changed: nothing, a redeployment, or a retraining.

The step keys of the two commits are compared, so the decision is the plan's own: a data pointer, the code or a
parameter changes the key of train_model; [serve], [gate] or [check] only keys after it; documentation changes none.
`decide` is pure, `keys_at` reads git. Not covered: starting the run, which plans again and reuses what is done
(flows.push_handover).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deployments.errors import ConfigError
from flows.plan import step_keys
from flows.project import Project
from flows.settings import PipelineSettings, load_pipeline

Action = Literal["nothing", "redeploy", "retrain"]
TRAINING = ("pull_data", "train_model")
# What a changed input is called by a person; [train] is told apart key by key.
WORDS = {
    "data": "data",
    "path": "[data] path",
    "code": "code",
    "splits": "[data] splits",
    "gate": "[gate]",
    "name": "[pipeline] name",
    "serve": "[serve]",
    "rollout": "[serve]",
    "handler": "the handler of Reprise",
    "check": "[check]",
}


@dataclass(frozen=True, kw_only=True)
class StepKey:
    """A step's key at a commit, and what it is made of."""

    key: str
    inputs: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a push asks for, and why in one sentence."""

    action: Action
    reason: str


def decide(before: Mapping[str, StepKey] | None, after: Mapping[str, StepKey]) -> Decision:
    """From the step keys before (None: unknown, such as a new branch) and after. Pure."""
    if before is None:
        return Decision(action="retrain", reason="nothing to compare with: the plan of the run decides")
    changed = [name for name, step in after.items() if name not in before or before[name].key != step.key]
    if not changed:
        return Decision(action="nothing", reason="nothing that a model or its endpoint is made of changed")
    words = dict.fromkeys(word for name in changed for word in _changed_words(before, after, name))
    reason = f"{_and(list(words) or [f'a new version of {changed[0]}'])} changed"
    return Decision(action="retrain" if set(changed) & set(TRAINING) else "redeploy", reason=reason)


def _changed_words(before: Mapping[str, StepKey], after: Mapping[str, StepKey], name: str) -> list[str]:
    """What of its own made this step's key change; what came from a step before it is that step's to tell."""
    old = before[name].inputs if name in before else {}
    words = []
    for key, value in after[name].inputs.items():
        if old.get(key) == value or key in after:
            continue
        words += _train_words(old.get(key) or {}, value) if key == "train" else [WORDS.get(key, key)]
    return words


def _train_words(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    words = [f"[train] {k}" for k in new if k != "params" and old.get(k) != new[k]]
    was, now = old.get("params") or {}, new.get("params") or {}
    return words + [f"[train.params] {k}" for k in sorted({*was, *now}) if was.get(k) != now.get(k)]


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def keys_at(project: Project, pipeline: PipelineSettings, sha: str) -> dict[str, StepKey]:
    """The step keys at a commit, as a run of it would have them anywhere. Raises ConfigError or PreflightError.

    `pipeline` only says which file it is: what it says at the commit counts.
    """
    name = pipeline.file.name
    text = project.read_text(sha, project.in_repo(name))
    try:
        at_commit = load_pipeline(text, source_name=f"{name}@{sha[:7]}", file=pipeline.file)
    except RecursionError:
        raise ConfigError(
            f"{name}@{sha[:7]}: nested too deeply; expected settings as [section] and key = value"
        ) from None
    keys = step_keys(at_commit, project, sha)
    return {step: StepKey(key=key, inputs=inputs) for step, (key, inputs) in keys.steps.items()}
