"""A small real project for tests: git, DVC, a local remote that verifies, a folder of data in two splits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

MODULE = "def build_model(params):\n    return None\n"
_ENVIRONMENT = {
    "GIT_AUTHOR_NAME": "t",
    "GIT_AUTHOR_EMAIL": "t@localhost",
    "GIT_COMMITTER_NAME": "t",
    "GIT_COMMITTER_EMAIL": "t@localhost",
    "DVC_NO_ANALYTICS": "1",
}


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | _ENVIRONMENT
    command = ["git", "-c", "core.hooksPath=/dev/null", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def dvc(folder: Path, *commands: list[str]) -> None:
    """Run dvc commands in a folder, all in one process: DVC's import is most of their time."""
    program = f"from dvc.cli import main; import sys; sys.exit(max(main(c) for c in {list(commands)!r}))"
    command = [sys.executable, "-c", program]
    environment = os.environ | _ENVIRONMENT | {"DVC_SITE_CACHE_DIR": str(folder / ".dvc" / "tmp" / "site")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def commit(folder: Path, message: str = "change") -> str:
    """Commit everything; returns the sha."""
    git(folder, "add", "--all")
    git(folder, "commit", "-q", "--allow-empty", "-m", message)
    return git(folder, "rev-parse", "HEAD")


def make_project(root: Path, *, prefix: str = "", files: int = 6) -> Path:
    """A repository at `root`, the project in `prefix`: pipeline, module, data/d (train/, heldout/), data/one.csv."""
    folder = root / prefix
    (folder / "data").mkdir(parents=True)
    git(root, "init", "-q", "-b", "main")
    (root / ".gitignore").write_text(".reprise/\n.remote/\n")
    (folder / "pipeline.toml").write_text('[pipeline]\nname = "t"\n[data]\npath = "data/d"\n[model]\nmodule = "m.py"\n')
    (folder / "m.py").write_text(MODULE)
    for number in range(files):
        for split in ("train", "heldout"):
            file = folder / "data" / "d" / split / f"{number}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{split} {number}\n" * 20)
    (folder / "data" / "one.csv").write_text("a,b\n1,2\n")
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (folder / ".dvc" / "config").write_text(
        "[core]\n    remote = store\n['remote \"store\"']\n    url = ../.remote\n    verify = true\n"
    )
    dvc(folder, ["add", "-q", "data/d", "data/one.csv"], ["push", "-q"])
    commit(root, "first")
    return folder


def copy_project(template: Path, root: Path) -> Path:
    """A project of one's own, from a template's root."""
    shutil.copytree(template, root, symlinks=True)
    return root
