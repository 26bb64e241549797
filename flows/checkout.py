"""A project's clone on the state volume: made by the first flow that needs it, renewed by the others.

    file, rev = checkout(url, Path("/reprise/projects/digits"), Path("pipeline.toml"), "HEAD")

Runs read commits, never the working tree, so several may use one clone at once; the tree only has to hold the pipeline
file's folder. A commit that is there is not fetched again: a run that goes on needs no remote. Credentials: git's own
ways (GIT_CONFIG_*, GIT_SSH_COMMAND, a credential helper), from a Secret in the pod's environment.
Not covered: pushes (flows.fetch), data (tasks.pull_data).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from deployments.errors import ConfigError, PreflightError, TryAgain
from flows.fetch import SHA, has_commit
from flows.project import Project
from tasks.records import Store

BRANCHES = "+refs/heads/*:refs/remotes/origin/*"
SECONDS = 600  # for a clone or a fetch
NOT_FOUND = ("does not exist", "not found", "does not appear to be a git repository", "Authentication failed", "denied")


def checkout(url: str, folder: Path, pipeline: Path, rev: str) -> tuple[Path, str]:
    """The clone's pipeline file, and `rev` as the clone knows it: branches are those of the remote.

    Raises ConfigError for a URL or a revision that does not exist, TryAgain if the remote is away.
    """
    if pipeline.is_absolute() or ".." in pipeline.parts:
        raise ConfigError(f"pipeline file {pipeline}: expected its path from the repository's root, like pipeline.toml")
    with Store(root=str(folder.parent)).lock(f"clone-{folder.name}", wait_seconds=SECONDS):
        return _renewed(url, folder, pipeline, rev)


def _renewed(url: str, folder: Path, pipeline: Path, rev: str) -> tuple[Path, str]:
    _clone(url, folder)
    project = Project(folder)
    if not (SHA.fullmatch(rev) and has_commit(project, rev)):
        _git(folder, "remote", "set-url", "origin", url)
        _git(folder, "fetch", "--quiet", "--force", "--tags", "--prune", "origin", BRANCHES)
        _git(folder, "remote", "set-head", "origin", "--auto")
        if SHA.fullmatch(rev) and not has_commit(project, rev):  # of no branch any more, if the server hands it out
            _git(folder, "fetch", "--quiet", "--no-tags", "origin", rev)
    rev = _of_the_remote(folder, rev)
    file = folder / pipeline
    if not file.is_file():  # on no branch that was checked out; what it says is read from the commit
        text = project.read_text(project.resolve(rev), pipeline.as_posix())
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return file, rev


def _clone(url: str, folder: Path) -> None:
    """Complete or not at all."""
    if (folder / ".git").is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _git(
            folder.parent, "clone", "--quiet", "--no-recurse-submodules", "--end-of-options", url, str(aside / "clone")
        )
        (aside / "clone").rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _of_the_remote(folder: Path, rev: str) -> str:
    """A branch as the remote has it; a tag, a commit and what begins with origin/ as they are."""
    if rev == "HEAD":
        return "origin/HEAD"
    found = _run(
        folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"refs/remotes/origin/{rev}^{{commit}}"
    )
    return f"origin/{rev}" if found.returncode == 0 else rev


def _git(folder: Path, *arguments: str) -> None:
    try:
        done = _run(folder, *arguments)
    except subprocess.TimeoutExpired:
        raise TryAgain(
            f"git {arguments[0]}: no end after {SECONDS} s; is the remote reachable from the cluster?"
        ) from None
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        kind = PreflightError if any(words in said for words in NOT_FOUND) else TryAgain
        raise kind(
            f"git {arguments[0]} of the project failed: {said}; expected a remote that this pod can read: "
            "[project] git in cluster.toml, credentials by [environment] secrets"
        )


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith(("GIT_CONFIG", "GIT_SSH"))}
    return subprocess.run(
        ["git", "--no-pager", *arguments],
        cwd=folder,
        env={**kept, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS,
        check=False,
    )
