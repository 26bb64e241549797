"""The decision table: real `git push` to a real bare repository with the shipped post-receive hook, a line a case.

The README's table is this one; a test compares them.

.venv/bin/pytest -s tests/flows/test_push_handover_hook.py     # prints what the pusher reads
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.flows.push_kit import HOOK, FakePrefect, Repositories, git


class Pusher:
    """A developer's clone; each method makes a change and gives the arguments of `git push`."""

    def __init__(self, repos: Repositories) -> None:
        self.repos, self.work = repos, repos.work

    def write(self, file: str, old: str, new: str) -> tuple[str, ...]:
        text = (self.work / file).read_text()
        assert re.search(old, text), (file, old)
        (self.work / file).write_text(re.sub(old, new, text, count=1))
        git(self.work, "commit", "-qam", f"{file}: {new}")
        return ("main",)

    def documentation(self) -> tuple[str, ...]:
        return self.write("notes.md", "Digits", "Numbers")

    def serve(self) -> tuple[str, ...]:
        return self.write("pipeline.toml", "batch_size = 8", "batch_size = 4")

    def data(self) -> tuple[str, ...]:
        """The pointer, as `dvc add` writes it for other data."""
        return self.write("data/digits.dvc", r"md5: .", "md5: f")

    def code(self) -> tuple[str, ...]:
        return self.write("digits.py", "import torch", "import torch  # as it was")

    def parameters(self) -> tuple[str, ...]:
        return self.write("pipeline.toml", "width = 16", "width = 17")

    def other_branch(self) -> tuple[str, ...]:
        git(self.work, "branch", "-f", "next")
        return ("next",)

    def deleted_branch(self) -> tuple[str, ...]:
        return ("--delete", "next")

    def tag(self) -> tuple[str, ...]:
        git(self.work, "tag", "v1")
        return ("v1",)

    def forced_push(self) -> tuple[str, ...]:
        """Back before the parameters, and on from there with words."""
        git(self.work, "reset", "-q", "--hard", "HEAD~1")
        return ("--force", *self.write("notes.md", "Numbers", "Figures"))

    def merge(self) -> tuple[str, ...]:
        """A branch with another seed, merged into main, where words were written meanwhile."""
        git(self.work, "checkout", "-q", "-b", "seed")
        self.write("pipeline.toml", "seed = 7", "seed = 8")
        git(self.work, "checkout", "-q", "main")
        self.write("notes.md", "Figures", "Digits")
        git(self.work, "merge", "-q", "--no-edit", "seed")
        return ("main",)

    def burst(self) -> tuple[str, ...]:
        """Three commits, one push; only the first is about the model."""
        self.write("pipeline.toml", "dropout = 0.25", "dropout = 0.3")
        self.documentation()
        return self.write("notes.md", "Numbers", "Words")

    def broken(self) -> tuple[str, ...]:
        return self.write("pipeline.toml", r"\[gate\]", "[gait]")


Case = tuple[Callable[[Pusher], tuple[str, ...]], str, int]
TABLE: list[Case] = [  # what is pushed, what the pusher reads, runs that it starts
    (Pusher.documentation, "nothing, because nothing that a model or its endpoint is made of changed", 0),
    (Pusher.serve, "redeploy, because [serve] changed", 1),
    (Pusher.data, "retrain, because data changed", 1),
    (Pusher.code, "retrain, because code changed", 1),
    (Pusher.parameters, "retrain, because [train.params] width changed", 1),
    (Pusher.other_branch, "ignored, because branch next is not listed in [push] branches", 0),
    (Pusher.deleted_branch, "ignored, because the branch was deleted", 0),
    (Pusher.tag, "ignored, because refs/tags/v1 is no branch", 0),
    (Pusher.forced_push, "retrain, because [train.params] width changed", 1),
    (Pusher.merge, "retrain, because [train] seed changed", 1),
    (Pusher.burst, "retrain, because [train.params] dropout changed", 1),
    (Pusher.broken, "[gait]: unknown section", 0),
]


@pytest.fixture(scope="module")
def prefect() -> Iterator[FakePrefect]:
    with FakePrefect() as fake:
        yield fake


@pytest.fixture(scope="module")
def pusher(tmp_path_factory: pytest.TempPathFactory, prefect: FakePrefect) -> Pusher:
    template = Repositories.make_template(tmp_path_factory.mktemp("template"))
    repos = Repositories(tmp_path_factory.mktemp("place"), prefect.port, template=template)
    repos.install_hook()
    git(repos.bare, "config", "reprise.pipeline", str(repos.checkout / "pipeline.toml"))
    git(repos.bare, "config", "reprise.command", f"{sys.executable} -m flows")
    git(repos.work, "branch", "-q", "-M", "main")
    return Pusher(repos)


@pytest.mark.parametrize("change, said, runs", TABLE, ids=[c[0].__name__ for c in TABLE])
def test_a_push(
    pusher: Pusher, prefect: FakePrefect, change: Callable[[Pusher], tuple[str, ...]], said: str, runs: int
) -> None:
    before = len(prefect.runs)
    what = change(pusher)
    root = str(HOOK.parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        ["git", "push", "origin", *what], cwd=pusher.work, env=env, capture_output=True, text=True, check=True
    )
    heard = [line.removeprefix("remote: ").rstrip() for line in done.stderr.splitlines() if "remote: digits" in line]
    print(f"{change.__name__:<15} {' '.join(heard)[:150]}")
    assert len(heard) == 1 and said in heard[0], done.stderr
    assert len(prefect.runs) - before == runs
    if runs:
        assert list(prefect.runs.values())[-1]["parameters"] == {"rev": pusher.repos.head(), "cause": "push"}


def test_the_table_in_the_readme_is_this_one() -> None:
    """Same lines, same order, same words; the burst is told below it."""
    text = (HOOK.parents[2] / "README.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text.split("| a push of |")[1].split("\n\n")[0], re.M)
    table = [case for case in TABLE if case[0] is not Pusher.burst]
    assert len(rows) == len(table)
    for (pushed, starts, because), (change, said, runs) in zip(rows, table, strict=True):
        assert said.rpartition("because ")[2] in because, (pushed, change.__name__)
        assert (starts != "nothing") == bool(runs), pushed
        verb = said.partition(",")[0]
        assert runs == 0 or starts.startswith(("what differs", f"a {verb}")), starts
