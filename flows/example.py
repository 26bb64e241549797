"""The examples as real projects: a git repository with DVC, a remote that verifies, data, module, pipeline.toml.

    create_project("digits", Path("demo"))   # the same commit sha on every machine
    change_data(Path("demo"))                # a commit that adds training data, as labelling some more would

Not covered: running them (flows.demo). DVC and scikit-learn are imported inside the functions.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError, GiveUp

EXAMPLES = Path(__file__).resolve().parent.parent / "training" / "examples"
AUTHOR = ("Reprise example", "example@localhost")
_EPOCH = 1_767_225_600  # 2026-01-01: commits of fixed times make the same sha everywhere
_FILES = ("pipeline.toml", "README.md")  # and <example>.py
_DVC_CONFIG = """[core]
    analytics = false
    remote = storage
['remote "storage"']
    url = ../.dvc-remote
    verify = true
"""
_IGNORED = "/.reprise/\n/.dvc-remote/\n__pycache__/\n"


def examples() -> list[str]:
    """Names of the examples."""
    return sorted(p.parent.name for p in EXAMPLES.glob("*/pipeline.toml"))


def create_project(example: str, folder: Path) -> None:
    """Make `folder` the example's project, complete or not at all; one that is there already is left as it is.

    Raises ConfigError for an unknown example and for a folder that holds something else.
    """
    if example not in examples():
        raise ConfigError(f"example {example!r} is not known; expected one of: {', '.join(examples())}")
    folder = folder.absolute()
    if (folder / "pipeline.toml").is_file() and (folder / ".git").exists():
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder}: holds something that is no example project; expected a folder that is empty or not there yet; "
            "name another folder, or remove this one"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        aside.chmod(0o755)
        for name in (*_FILES, f"{example}.py"):
            shutil.copyfile(EXAMPLES / example / name, aside / name)
        (aside / ".gitignore").write_text(_IGNORED)
        _git(aside, "init", "-q", "-b", "main")
        _make_data(example).make_data(aside / "data" / example)
        _init_dvc(aside)
        with _dvc(aside) as repo:
            _track(repo, aside / "data" / example)
        _commit(aside, f"The {example} example: data, model, pipeline", number=0)
        aside.rename(folder)
    except FileNotFoundError as error:
        raise GiveUp(f"{folder}: cannot be made: {error}; expected git on the PATH and a whole installation") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def change_data(folder: Path) -> str:
    """Add training data to an example project, `dvc add`, push and commit it; returns the new commit's sha."""
    folder = folder.absolute()
    example = next((name for name in examples() if (folder / "data" / f"{name}.dvc").is_file()), None)
    if example is None:
        raise ConfigError(
            f"{folder}: is no example project; expected a data/<example>.dvc in it; make one: reprise demo"
        )
    number = int(_git(folder, "rev-list", "--count", "HEAD"))
    data = folder / "data" / example
    with _dvc(folder) as repo:
        if not data.exists():
            repo.pull(str(data))
        repo.unprotect(str(data))
        added = _make_data(example).add_data(data, number)
        _track(repo, data)
    return _commit(folder, f"{added} more training samples", number=number)


def _make_data(example: str) -> Any:
    return importlib.import_module(f"training.examples.{example}.make_data")


def _init_dvc(folder: Path) -> None:
    """What `dvc init` and `dvc remote add` write, with a URL that is relative, so that the folder can be moved."""
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text(_DVC_CONFIG)
    (folder / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (folder / ".dvcignore").write_text(
        "# Patterns of files that dvc should ignore: https://dvc.org/doc/user-guide/dvcignore\n"
    )


@contextmanager
def _dvc(folder: Path) -> Iterator[Any]:
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.ERROR)  # it would tell the person to do by hand what is done here
    repo = Repo(str(folder), config={"core": {"site_cache_dir": str(folder / ".dvc" / "tmp" / "site")}})
    try:
        yield repo
    finally:
        repo.close()


def _track(repo: Any, data: Path) -> None:
    repo.add(str(data))
    repo.push(str(data))


def _commit(folder: Path, message: str, *, number: int) -> str:
    _git(folder, "add", "--all")
    _git(folder, "commit", "-q", "-m", message, number=number)
    return _git(folder, "rev-parse", "HEAD")


def _git(folder: Path, *arguments: str, number: int = 0) -> str:
    when = f"{_EPOCH + 86_400 * number} +0000"
    name, address = AUTHOR
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {
        "GIT_AUTHOR_NAME": name,
        "GIT_AUTHOR_EMAIL": address,
        "GIT_AUTHOR_DATE": when,
        "GIT_COMMITTER_NAME": name,
        "GIT_COMMITTER_EMAIL": address,
        "GIT_COMMITTER_DATE": when,
        "LC_ALL": "C",
    }
    # The person's own settings must neither sign these commits, nor run hooks on them, nor change their bytes.
    fixed = ("-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null", "-c", "core.autocrlf=false")
    done = subprocess.run(["git", *fixed, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise GiveUp(f"{folder}: git {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()
