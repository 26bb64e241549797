"""Commits from a project's git remote, fetched without touching the working tree or any branch of the checkout.

A pushed sha is checked against 40 hex digits before git sees it, and nothing from outside can become an option. What is
fetched is kept from git's garbage collection by a reference of its own, refs/reprise/<branch>. Not covered: reading
commits (flows.project), data (tasks.pull_data).
"""

from __future__ import annotations

import os
import re
import subprocess

from deployments.errors import ConfigError, TryAgain
from flows.project import Project

FETCH_SECONDS = 120
SHA = re.compile(r"[0-9a-f]{40}")
_PASSWORD = re.compile(r"(?<=[/\s'])[^\s@/']*:[^\s@']*@")  # user:password@ in an address
_NO_BRANCH = "couldn't find remote ref"  # git's words (LC_ALL=C) where the remote is there and the branch is not
_REMOTE_BRANCH = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)/([A-Za-z0-9_][A-Za-z0-9_./-]*)")


class NotThere(TryAgain):
    """The remote answers and does not have the commit: not yet, or not any more."""


def fetch_commit(project: Project, sha: str, *, remote: str, branch: str) -> None:
    """Make the commit available: at once if it is there, else with its branch, else by its sha.

    Raises ConfigError for a sha that is none, TryAgain if the remote is away, NotThere if it does not have the commit.
    """
    if not SHA.fullmatch(sha):
        raise ConfigError(f"commit {sha!r} is no full sha; expected 40 hex digits")
    if has_commit(project, sha):
        return
    said = _fetch(project, remote, f"+refs/heads/{branch}:refs/reprise/{branch}")
    if has_commit(project, sha):
        return
    answered = not said or _NO_BRANCH in said
    said = _fetch(project, remote, sha) or said  # behind a forced push, if the server hands out single commits
    if not has_commit(project, sha):
        kind = NotThere if answered else TryAgain
        raise kind(f"{project.root}: commit {sha} cannot be fetched from {remote}: {said or 'it is not there'}")


def fetch_revision(project: Project, rev: str) -> None:
    """Renew "origin/main" and the like before it is resolved; other revisions are left as they are. Raises TryAgain."""
    found = _REMOTE_BRANCH.fullmatch(rev)
    if found is None or found[1] not in _git(project, "remote").stdout.split():
        return
    if said := _fetch(project, found[1], f"+refs/heads/{found[2]}:refs/remotes/{found[1]}/{found[2]}"):
        raise TryAgain(f"{project.root}: {rev} cannot be fetched: {said}; is the remote there? git remote -v")


def origin_url(project: Project) -> str:
    """The URL of the remote `origin`, empty if there is none."""
    return _git(project, "remote", "get-url", "origin").stdout.strip()


def has_commit(project: Project, sha: str) -> bool:
    """Whether the repository has the whole commit."""
    return _git(project, "cat-file", "-e", f"{sha}^{{commit}}").returncode == 0


def is_ancestor(project: Project, older: str, newer: str) -> bool:
    """Whether `older` is part of the history of `newer`; False if either is not there."""
    return _git(project, "merge-base", "--is-ancestor", older, newer).returncode == 0


def _fetch(project: Project, remote: str, what: str) -> str:
    """What git said when it failed, empty when it did not."""
    options = ("--quiet", "--no-tags", "--no-write-fetch-head", "--no-recurse-submodules", "--no-auto-maintenance")
    try:
        done = _git(project, "fetch", *options, "--end-of-options", remote, what)
    except subprocess.TimeoutExpired:
        return f"no end after {FETCH_SECONDS} s"
    said = _PASSWORD.sub("", done.stderr.strip())  # it goes to logs, and to the commit's page
    return "" if done.returncode == 0 else (said or f"exit code {done.returncode}")


def _git(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    # In a hook GIT_DIR names the repository that was pushed to, not ours; a prompt for a password would wait for ever.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith(("GIT_CONFIG_", "GIT_SSH"))}
    env = {**kept, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}
    return subprocess.run(
        ["git", "--no-pager", *arguments],
        cwd=project.root,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=FETCH_SECONDS,
        check=False,
    )


def branches(project: Project, limit: int = 20) -> list[str]:
    """Branches of the checkout and of its remotes, those changed last first; [] if there is no repository."""
    wanted = ("for-each-ref", "--format=%(refname:short)", "--sort=-committerdate", f"--count={limit}")
    found = _git(project, *wanted, "refs/heads", "refs/remotes").stdout.split()
    return [name for name in found if (not name.endswith("/HEAD") and "/" in name) or name.count("/") == 0]
