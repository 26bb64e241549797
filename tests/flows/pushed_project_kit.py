"""A project of the cluster place, committed and on its remote; the fixture `project` is in conftest.py."""

from __future__ import annotations

from pathlib import Path

from tests.flows.push_kit import git
from tests.flows.test_cluster_settings import LEAST
from tests.flows.test_settings import GOOD

MODULE = """
def build_model(params): ...
def load_split(folder, split, params): ...
def heldout_requests(folder, split, params): ...
def preprocess(body): ...
def postprocess(output): ...
"""


def make_pushed_project(folder: Path) -> Path:
    """`folder`/digits, whose remote is `folder`/digits.git."""
    made, remote = folder / "digits", folder / "digits.git"
    made.mkdir()
    git(folder, "init", "-q", "--bare", str(remote))
    git(made, "init", "-q", "-b", "main")
    for name, text in (("pipeline.toml", GOOD), ("digits.py", MODULE), ("cluster.toml", LEAST)):
        (made / name).write_text(text)
    git(made, "add", "-A")
    git(made, "commit", "-q", "-m", "x")
    git(made, "remote", "add", "origin", str(remote))
    git(made, "push", "-q", "origin", "main")
    return made
