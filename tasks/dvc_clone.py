"""A private clone of the user's repository at one commit, opened by DVC with the shared cache and the user's remote.

One clone a run, because a DVC repository is one lock: two pulls in one would fail each other. Paths in .dvc/config are
relative to the user's repository, not to the clone, so they are resolved there; .dvc/config.local (credentials) is read
there too. Not covered: what is pulled (tasks.pull_data). DVC is imported inside the function.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError, GiveUp, PreflightError
from tasks.data_faults import Remote


@contextmanager
def open_clone(repo: Path, sha: str, path: str, clone: Path, cache: Path) -> Iterator[Any]:
    """Clone `repo` at `sha` into the new folder `clone` and yield a dvc.repo.Repo for the output `path`.

    Raises ConfigError (no such commit, no .dvc) and PreflightError (a remote that is missing or does not verify).
    """
    if not repo.is_dir():
        raise ConfigError(f"{repo}: no such folder; expected the git repository of the project")
    _git(repo, "clone", "--quiet", "--shared", "--no-checkout", "--", str(repo), str(clone))
    _git(clone, "checkout", "--quiet", "--detach", sha, "--")
    dvc_root = next((p for p in (clone / path).parents if (p / ".dvc").is_dir() and p.is_relative_to(clone)), None)
    if dvc_root is None:
        raise ConfigError(f"{path}@{sha[:7]}: the commit has no .dvc folder; make it: dvc init && git commit")
    os.environ["DVC_NO_ANALYTICS"] = "1"
    from dvc.config import ConfigError as DvcConfigError
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.CRITICAL)  # its messages blame the cache; ours say what is wrong
    logging.getLogger("dvc_data").setLevel(logging.CRITICAL)
    logging.getLogger("dvc_objects").setLevel(logging.CRITICAL)
    config = _config(dvc_root / ".dvc", repo / dvc_root.relative_to(clone) / ".dvc")
    config["cache"] = {"dir": str(cache), "type": "reflink,hardlink,copy"}
    config.setdefault("core", {})["site_cache_dir"] = str(clone / ".dvc-site")  # goes away with the clone
    try:
        opened = Repo(str(dvc_root), config=config)
    except DvcConfigError as error:
        raise ConfigError(f"{path}@{sha[:7]}: .dvc/config: {error}; expected what `dvc remote` writes") from None
    try:
        yield opened
    finally:
        opened.close()


def remote_of(repo: Any, out: Any) -> Remote:
    """The remote that has the output. Raises PreflightError if there is none fit for use."""
    name = out.remote or repo.config["core"].get("remote")
    known = ", ".join(repo.config["remote"]) or "none"
    if not name:
        raise PreflightError(f".dvc/config: no default remote (known: {known}); set it: dvc remote default NAME")
    if name not in repo.config["remote"]:
        raise PreflightError(
            f".dvc/config: remote {name!r} is not described (known: {known}); dvc remote add {name} URL"
        )
    if not repo.config["remote"][name].get("verify"):
        raise PreflightError(
            f".dvc/config: remote {name!r} does not verify what it gives; expected verify = true; "
            f"set it: dvc remote modify {name} verify true && git commit"
        )
    url = str(repo.config["remote"][name]["url"])
    return Remote(name=name, url=url, odb=repo.cloud.get_remote_odb(name=name, command="pull"))


def _config(cloned: Path, original: Path) -> dict[str, Any]:
    """.dvc/config of the commit and config.local of the machine, paths resolved against the user's repository."""
    from dvc.config import Config, merge

    merged: dict[str, Any] = {}
    for file in (cloned / Config.CONFIG, original / Config.CONFIG_LOCAL):
        if file.is_file():
            merge(merged, Config._load_paths(Config.load_file(str(file)), str(original / file.name)))
    return merged


def _git(folder: Path, *arguments: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith("GIT_CONFIG_")}
    environment |= {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_LFS_SKIP_SMUDGE": "1"}
    command = ["git", "-c", "core.hooksPath=/dev/null", "-c", "advice.detachedHead=false", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise PreflightError("git is not on the PATH; expected git 2.30 or newer; install it") from None
    if done.returncode:
        raise GiveUp(f"{folder}: git {arguments[0]} failed: {done.stderr.strip()}; expected a sound git repository")
