"""The examples as projects: real git, real DVC, the same commit every time, complete or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.errors import ConfigError
from flows import example
from flows.example import change_data, create_project, examples
from flows.project import Project
from flows.settings import load_pipeline
from tests.tasks.dvc_kit import git

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # pygtrie's, called by DVC


def test_there_are_two() -> None:
    assert examples() == ["digits", "tumours"]


def test_a_project_its_repetition_and_its_data_changes(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    create_project("tumours", folder)
    project = Project(folder)
    first = project.resolve("HEAD")
    pointer = project.data_pointer(first, "data/tumours")
    assert (pointer.nfiles, pointer.remote) == (2, "storage")
    assert git(folder, "status", "--porcelain") == ""
    assert load_pipeline(folder / "pipeline.toml").name == "tumours"
    (folder / ".reprise").mkdir()
    (folder / ".reprise" / "x").touch()
    (folder / "README.md").write_text("mine")
    create_project("tumours", folder)
    assert (folder / "README.md").read_text() == "mine" and project.resolve("HEAD") == first
    git(folder, "checkout", "-q", "README.md")

    second, third = change_data(folder), change_data(folder)
    digests = [project.data_pointer(sha, "data/tumours").digest for sha in (first, second, third)]
    assert len(set(digests)) == 3
    assert project.changed(first, third) == ["data/tumours.dvc"]
    assert git(folder, "status", "--porcelain") == ""
    pushed = {p.parent.name + p.name for p in (folder / ".dvc-remote").rglob("files/md5/*/*")}
    assert set(digests) <= pushed

    create_project("tumours", tmp_path / "again")
    assert Project(tmp_path / "again").resolve("HEAD") == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "demo"]


def test_unknown_example_and_taken_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of: digits, tumours"):
        create_project("digit", tmp_path / "x")
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigError, match="holds something that is no example project"):
        create_project("digits", tmp_path)
    with pytest.raises(ConfigError, match="holds something"):
        create_project("digits", tmp_path / "mine.txt")
    with pytest.raises(ConfigError, match="is no example project"):
        change_data(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_half_a_project_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "_track", fail)
    with pytest.raises(KeyboardInterrupt):
        create_project("tumours", tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []
