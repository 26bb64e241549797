"""The clone on the state volume, by real git: made once, renewed, and enough by itself once the commit is there."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from deployments.errors import ConfigError, PreflightError, StepError
from flows.checkout import checkout
from flows.project import Project
from tests.flows.push_kit import git

FILE = Path("pipeline.toml")


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A repository with one commit on main, and a tag."""
    made = tmp_path / "remote"
    made.mkdir()
    git(made, "init", "-q", "-b", "main")
    commit(made, "first")
    git(made, "tag", "v1")
    return made


def commit(repository: Path, text: str) -> str:
    (repository / FILE).write_text(text)
    git(repository, "add", "-A")
    git(repository, "-c", "user.name=t", "-c", "user.email=t@example.invalid", "commit", "-q", "-m", text)
    return Project(repository).resolve("HEAD")


def at(remote: Path, folder: Path, rev: str) -> str:
    """The commit that a revision is in the clone."""
    file, found = checkout(str(remote), folder / "projects" / "digits", FILE, rev)
    assert file == folder / "projects" / "digits" / FILE and file.is_file()
    return Project(file.parent).resolve(found)


def test_branches_are_those_of_the_remote(remote: Path, tmp_path: Path) -> None:
    first = Project(remote).resolve("HEAD")
    assert [at(remote, tmp_path, rev) for rev in ("HEAD", "main", "origin/main", "v1", first)] == [first] * 5
    second = commit(remote, "second")
    assert [at(remote, tmp_path, rev) for rev in ("HEAD", "main", "v1", first)] == [second, second, first, first]
    git(remote, "reset", "-q", "--hard", "v1")
    assert at(remote, tmp_path, "main") == first, "a forced push counts"
    assert sorted(p.name for p in (tmp_path / "projects").iterdir()) == ["digits", "locks"], "nothing is left over"


def test_a_commit_that_is_there_needs_no_remote(remote: Path, tmp_path: Path) -> None:
    first = at(remote, tmp_path, "HEAD")
    remote.rename(tmp_path / "away")
    assert at(remote, tmp_path, first) == first
    with pytest.raises(PreflightError, match=r"git fetch of the project failed: .*does not"):
        at(remote, tmp_path, "main")


def test_a_commit_of_no_branch_is_fetched_by_its_sha(remote: Path, tmp_path: Path) -> None:
    at(remote, tmp_path, "HEAD")
    lost = commit(remote, "lost")
    git(remote, "reset", "-q", "--hard", "v1")
    git(remote, "config", "uploadpack.allowAnySHA1InWant", "true")
    assert at(remote, tmp_path, lost) == lost


def test_a_pipeline_file_that_another_branch_adds(remote: Path, tmp_path: Path) -> None:
    git(remote, "checkout", "-q", "-b", "other")
    (remote / "models").mkdir()
    (remote / "models" / "b.toml").write_text("b")
    commit(remote, "other")
    git(remote, "checkout", "-q", "main")
    at(remote, tmp_path, "HEAD")
    file, _ = checkout(str(remote), tmp_path / "projects" / "digits", Path("models/b.toml"), "other")
    assert file.read_text() == "b"
    with pytest.raises(ConfigError, match=r"models/c.toml@.*no such file"):
        checkout(str(remote), tmp_path / "projects" / "digits", Path("models/c.toml"), "other")


def test_of_several_at_once_the_first_wins(remote: Path, tmp_path: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(at(remote, tmp_path, "v1"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1


@pytest.mark.parametrize("file", ["/etc/pipeline.toml", "../pipeline.toml"])
def test_a_file_outside(remote: Path, tmp_path: Path, file: str) -> None:
    with pytest.raises(ConfigError, match="from the repository's root"):
        checkout(str(remote), tmp_path / "clone", Path(file), "HEAD")


def test_a_url_is_no_option(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(StepError, match="of the project failed"):
        checkout(f"--upload-pack=touch {mark}", tmp_path / "clone", FILE, "HEAD")
    assert not mark.exists() and not (tmp_path / "clone").exists()
