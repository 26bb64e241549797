"""The plan: which change makes which step run, and the reason it gives. On a real git repository with a DVC pointer."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from flows.on_laptop import OnLaptop
from flows.plan import STEPS, Plan, make_plan
from flows.project import Project
from flows.settings import load_pipeline, load_place
from tasks.records import StepRecord, Store

PIPELINE = """
[pipeline]
name = "digits"
[data]
path = "data/digits"
[model]
module = "digits.py"
[train]
epochs = 2
"""
POINTER = "outs:\n- md5: {}.dir\n  size: 10\n  nfiles: 2\n  hash: md5\n  path: digits\n"
LABEL = "1.abcdef12"


class Folder:
    """A project whose steps can be declared done."""

    def __init__(self, path: Path) -> None:
        self.path, self.store = path, Store(root=str(path / ".reprise" / "store"))
        (path / ".dvc").mkdir()
        (path / ".dvc" / "config").write_text(
            "[core]\n    remote = r\n['remote \"r\"']\n    url = ../remote\n    verify = true\n"
        )
        (path / "data").mkdir()
        (path / ".gitignore").write_text(".reprise/\n")
        self.write("pipeline.toml", PIPELINE)
        self.write("digits.py", "A = 1\n")
        self.write("data/digits.dvc", POINTER.format("a" * 32))
        subprocess.run(["git", "init", "-q"], cwd=path, check=True)
        self.commit()

    def write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)

    def commit(self) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
        subprocess.run(["git", "add", "-A"], cwd=self.path, check=True)
        subprocess.run(["git", *identity, "commit", "-qm", "x", "--allow-empty"], cwd=self.path, check=True)

    def plan(self, *overrides: str) -> Plan:
        project = Project(self.path)
        sha = project.resolve("HEAD")
        pipeline = load_pipeline(
            project.read_text(sha, "pipeline.toml"), overrides=overrides, file=self.path / "pipeline.toml"
        )
        place = OnLaptop(settings=load_place("laptop", self.path))
        return make_plan(pipeline, place, project, self.store, sha)

    def finish(self, plan: Plan) -> None:
        """Every step of the plan as done, with effects that stand."""
        effect = self.path / ".reprise" / "effect"
        effect.mkdir(parents=True, exist_ok=True)
        (effect / "file").touch()
        results: dict[str, dict[str, Any]] = {
            "pull_data": {"folder": str(effect)},
            "train_model": {"weights": str(effect / "file")},
            "package_model": {"mar": str(effect / "file")},
            "deploy_model": {"label": LABEL},
        }
        for name, step in plan.steps.items():
            record = StepRecord(
                key=step.key,
                step=name,
                inputs=step.inputs,
                result=results.get(name, {}),
                run="digits-1",
                started=0,
                ended=1,
            )
            self.store.finish_step(record)
        self.store.write("pipelines/digits", {name: step.key for name, step in plan.steps.items()})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr("flows.on_laptop.in_service", lambda url, pipeline: LABEL)
    project = tmp_path / "project"
    project.mkdir()
    return Folder(project)


def runs(plan: Plan) -> list[str]:
    return [name for name, step in plan.steps.items() if not step.reused]


def test_at_first_everything_runs(folder: Folder) -> None:
    plan = folder.plan()
    assert runs(plan) == list(STEPS)
    assert {s.reason for s in plan.steps.values()} == {"first time"}
    assert not plan.unchanged


def test_then_nothing_runs_and_each_step_says_what_is_unchanged(folder: Folder) -> None:
    folder.finish(folder.plan())
    plan = folder.plan()
    assert plan.unchanged
    assert plan.steps["pull_data"].reason == "unchanged: data aaaaaaa, path data/digits"
    assert all(s.reason.startswith("unchanged: ") for s in plan.steps.values())


@pytest.mark.parametrize(
    ("file", "text", "first"),
    [
        ("data/digits.dvc", POINTER.format("b" * 32), "pull_data"),
        ("digits.py", "A = 2\n", "train_model"),
        ("pipeline.toml", PIPELINE.replace("epochs = 2", "epochs = 3"), "train_model"),
        ("pipeline.toml", PIPELINE + "[gate]\nminimum = 0.5\n", "register_model"),
        ("pipeline.toml", PIPELINE + "[serve]\nbatch_size = 4\n", "package_model"),
        ("pipeline.toml", PIPELINE + "[serve]\ngolden = 4\n", "deploy_model"),
        ("pipeline.toml", PIPELINE + "[check]\nsamples = 4\n", "check_endpoint"),
    ],
)
def test_a_commit_runs_the_steps_from_its_change_on(folder: Folder, file: str, text: str, first: str) -> None:
    folder.finish(folder.plan())
    folder.write(file, text)
    folder.commit()
    plan = folder.plan()
    assert runs(plan) == list(STEPS[STEPS.index(first) :])
    assert plan.steps[first].reason.startswith("changed: ")


def test_a_commit_of_documentation_runs_nothing(folder: Folder) -> None:
    folder.finish(folder.plan())
    folder.write("README.md", "words")
    folder.write("pipeline.toml", PIPELINE + "# a comment\n")
    folder.commit()
    assert folder.plan().unchanged


def test_what_is_not_committed_is_not_planned(folder: Folder) -> None:
    folder.finish(folder.plan())
    folder.write("digits.py", "A = 3\n")
    assert folder.plan().unchanged


def test_an_override_is_a_change_of_its_own(folder: Folder) -> None:
    folder.finish(folder.plan())
    assert runs(folder.plan("train.seed=4"))[0] == "train_model"
    assert folder.plan("train.interruptions=50").unchanged  # budgets do not decide the weights


def test_another_version_in_service_deploys_again(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.finish(folder.plan())
    monkeypatch.setattr("flows.on_laptop.in_service", lambda url, pipeline: "2.other")
    plan = folder.plan()
    assert runs(plan) == ["deploy_model", "check_endpoint"]
    assert plan.steps["deploy_model"].reason == "version 2.other is in service"


def test_lost_weights_are_trained_again_but_lost_data_of_a_done_training_are_not_pulled(folder: Folder) -> None:
    plan = folder.plan()
    folder.finish(plan)
    record = folder.store.step(plan.steps["pull_data"].key)
    assert record is not None
    folder.store.finish_step(StepRecord(**{**vars(record), "result": {"folder": "/nowhere"}}))
    assert folder.plan().steps["pull_data"].reason == "not needed: its training is done"
    (folder.path / ".reprise" / "effect" / "file").unlink()
    plan = folder.plan()
    assert plan.steps["train_model"].reason == "the weights are gone"
    assert plan.steps["pull_data"].reason == "the pulled data is gone"
