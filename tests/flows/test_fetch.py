"""Commits fetched from a real remote: by branch, by sha behind a forced push, and never as an option."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.errors import ConfigError, TryAgain
from flows.fetch import branches, fetch_commit, fetch_revision, has_commit, is_ancestor
from flows.project import Project
from tests.flows.push_kit import git


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A developer's repository, a bare one, and Reprise's clone."""
    folder = tmp_path / "work"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    git(folder, "commit", "-q", "--allow-empty", "-m", "one")
    git(tmp_path, "clone", "-q", "--bare", "work", "bare.git")
    git(folder, "remote", "add", "origin", "../bare.git")
    git(tmp_path, "clone", "-q", "bare.git", "clone")
    return folder


@pytest.fixture
def clone(work: Path) -> Project:
    return Project(work.parent / "clone")


def commit(work: Path, *, push: bool = True) -> str:
    git(work, "commit", "-q", "--allow-empty", "-m", "more")
    if push:
        git(work, "push", "-q", "--force", "origin", "HEAD")
    return git(work, "rev-parse", "HEAD")


def test_a_pushed_commit(work: Path, clone: Project) -> None:
    before = git(work, "rev-parse", "HEAD")
    sha = commit(work)
    assert not has_commit(clone, sha)
    fetch_commit(clone, sha, remote="origin", branch="main")
    assert has_commit(clone, sha) and is_ancestor(clone, before, sha) and not is_ancestor(clone, sha, before)
    assert git(clone.folder, "rev-parse", "main") == before, "the checkout's branches stay"
    git(clone.folder, "gc", "-q", "--prune=now")
    assert has_commit(clone, sha), "a reference of its own keeps it"


def test_one_that_is_there_asks_nobody(work: Path, clone: Project) -> None:
    (work.parent / "bare.git").rename(work.parent / "away.git")
    fetch_commit(clone, git(work, "rev-parse", "HEAD"), remote="origin", branch="main")


def test_one_behind_a_forced_push(work: Path, clone: Project) -> None:
    git(work.parent / "bare.git", "config", "uploadpack.allowAnySHA1InWant", "true")
    lost = commit(work)
    git(work, "reset", "-q", "--hard", "HEAD~1")
    commit(work)
    fetch_commit(clone, lost, remote="origin", branch="main")
    assert has_commit(clone, lost)


def test_one_that_is_nowhere_and_a_remote_that_is_away(work: Path, clone: Project) -> None:
    with pytest.raises(TryAgain, match="cannot be fetched from origin"):
        fetch_commit(clone, "1" * 40, remote="origin", branch="main")
    (work.parent / "bare.git").rename(work.parent / "away.git")
    with pytest.raises(TryAgain, match="cannot be fetched"):
        fetch_commit(clone, "1" * 40, remote="origin", branch="main")


@pytest.mark.parametrize("sha", ["--upload-pack=touch x", "HEAD", "1" * 39, "1" * 41, "G" * 40, "1" * 40 + "\n", ""])
def test_what_is_no_sha_never_reaches_git(clone: Project, sha: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.fetch._git", None)
    with pytest.raises(ConfigError, match="is no full sha"):
        fetch_commit(clone, sha, remote="origin", branch="main")


def test_a_remote_branch_is_renewed_and_nothing_else(work: Path, clone: Project) -> None:
    sha = commit(work)
    for other in ("HEAD", "main", "feature/x", "nowhere/main", sha):
        fetch_revision(clone, other)
    assert not has_commit(clone, sha)
    fetch_revision(clone, "origin/main")
    assert clone.resolve("origin/main") == sha
    (work.parent / "bare.git").rename(work.parent / "away.git")
    with pytest.raises(TryAgain, match="origin/main cannot be fetched"):
        fetch_revision(clone, "origin/main")


def test_git_in_a_hook_means_our_repository(work: Path, clone: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = commit(work)
    monkeypatch.setenv("GIT_DIR", str(work.parent / "bare.git"))
    fetch_commit(clone, sha, remote="origin", branch="main")
    monkeypatch.delenv("GIT_DIR")
    assert has_commit(clone, sha)


def test_branches(clone: Project) -> None:
    assert set(branches(clone)) == {"main", "origin/main"}


def test_a_password_in_the_address_of_the_remote_is_not_told(clone: Project) -> None:
    """git leaves it out of most of what it says, and not out of all."""
    for url in (
        "http://ada:s3cret@127.0.0.1:9/x",
        "http://ada:s3c/ret@127.0.0.1:9/x",
        "git://ada:s3cret@127.0.0.1:9/x",
    ):
        git(clone.root, "remote", "set-url", "origin", url)
        with pytest.raises(TryAgain, match=r"cannot be fetched from origin: .*127\.0\.0\.1") as caught:
            fetch_commit(clone, "1" * 40, remote="origin", branch="main")
        assert "s3c" not in str(caught.value)
