"""What a push asks for: the decision table, over step keys and over real commits."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from deployments.errors import ConfigError
from flows.example import change_data, create_project
from flows.project import Project
from flows.push_plan import Decision, StepKey, decide, keys_at
from flows.settings import load_pipeline


def keys(**changed: str) -> dict[str, StepKey]:
    """Keys chained as a plan chains them; `changed` gives a step another input."""
    before = ""
    made = {}
    for name in ("pull_data", "train_model", "register_model", "package_model", "deploy_model", "check_endpoint"):
        own = {
            "pull_data": {"data": "d1"},
            "train_model": {"code": "c1", "train": {"epochs": 3, "params": {"width": 8}}},
            "register_model": {"gate": {"minimum": 0}},
            "package_model": {"serve": {"batch_size": 8}},
            "deploy_model": {"rollout": {"soak": 1}},
            "check_endpoint": {"check": {"samples": 9}},
        }[name]
        own = {**own, **({"code": changed[name]} if name in changed else {}), "upstream": before}
        before = f"{name}:{sorted((k, str(v)) for k, v in own.items())}"
        made[name] = StepKey(key=before, inputs={k: v for k, v in own.items() if k != "upstream"})
    return made


@pytest.mark.parametrize(
    ("step", "action"),
    [
        ("pull_data", "retrain"),
        ("train_model", "retrain"),
        ("register_model", "redeploy"),
        ("package_model", "redeploy"),
        ("deploy_model", "redeploy"),
        ("check_endpoint", "redeploy"),
    ],
)
def test_the_first_changed_step_decides(step: str, action: str) -> None:
    assert decide(keys(), keys(**{step: "other"})) == Decision(action=action, reason="code changed")  # type: ignore[arg-type]


def test_nothing_changed() -> None:
    assert decide(keys(), keys()).action == "nothing"


def test_nothing_to_compare_with_is_left_to_the_plan_of_the_run() -> None:
    assert decide(None, keys()).action == "retrain"


def test_parameters_are_named_one_by_one() -> None:
    before, after = keys(), keys(train_model="x")
    after["train_model"] = StepKey(
        key="other", inputs={"code": "c1", "train": {"epochs": 4, "params": {"width": 8, "depth": 2}}}
    )
    assert decide(before, after).reason == "[train] epochs and [train.params] depth changed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("push") / "digits"
    create_project("digits", made)
    return made


def commit(folder: Path, **files: str) -> str:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run([*git, "add", "-A"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "-qm", "change"], cwd=folder, check=True)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def edit(folder: Path, old: str, new: str, file: str = "pipeline.toml") -> str:
    text = (folder / file).read_text()
    assert old in text
    return commit(folder, **{file.replace(".", "__"): text.replace(old, new)})


def test_the_table_over_real_commits(folder: Path) -> None:
    """Documentation, data, code, parameters, serving, gate, check, budgets, triggers, a broken file: one line each."""
    project = Project(folder)
    pipeline = load_pipeline(folder / "pipeline.toml")
    at = project.resolve("HEAD")
    table = [
        (lambda: commit(folder, README__md="new words\n"), "nothing", "nothing that a model"),
        (lambda: commit(folder, notes__txt="new file\n"), "nothing", "nothing that a model"),
        (lambda: change_data(folder), "retrain", "data changed"),
        (lambda: edit(folder, "import torch", "import torch  # the same", "digits.py"), "retrain", "code changed"),
        (lambda: edit(folder, "epochs = 12", "epochs = 13"), "retrain", "[train] epochs changed"),
        (lambda: edit(folder, "width = 16", "width = 17"), "retrain", "[train.params] width changed"),
        (lambda: edit(folder, "workers = 2  ", "workers = 1  "), "nothing", "nothing that a model"),
        (lambda: edit(folder, "keep = 3", "keep = 4"), "nothing", "nothing that a model"),
        (lambda: edit(folder, "batch_size = 8", "batch_size = 4"), "redeploy", "[serve] changed"),
        (lambda: edit(folder, "minimum = 0.95", "minimum = 0.9"), "redeploy", "[gate] changed"),
        (lambda: edit(folder, "samples = 400", "samples = 300"), "redeploy", "[check] changed"),
        (lambda: edit(folder, "[gate]", '[schedule]\ncron = "0 3 * * *"\n\n[gate]'), "nothing", "nothing that a model"),
    ]
    for change, action, reason in table:
        before, at = at, change()
        decision = decide(keys_at(project, pipeline, before), keys_at(project, pipeline, at))
        assert (decision.action, decision.reason[: len(reason)]) == (action, reason)
    broken = edit(folder, "[gate]", "[gait]")
    with pytest.raises(ConfigError, match=rf"pipeline.toml@{broken[:7]}:\d+: \[gait\]: unknown section"):
        keys_at(project, pipeline, broken)
