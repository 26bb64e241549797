"""Repositories as they are: long histories, strange names, submodules, forced pushes. Real git, through the queue."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flows.push_handover import Target, drain, open_target, wait_for
from flows.push_queue import ZERO, Entry, Push
from tests.flows.push_kit import FakePrefect, Repositories, git


def told(target: Target, before: str, after: str) -> Entry:
    """A push as a receiver keeps it, decided."""
    push_id, _ = target.queue.add(Push(repository="acme/digits", branch="main", before=before, after=after))
    return wait_for(target, push_id, 30)


def pushed(repos: Repositories, message: str = "x") -> tuple[str, str]:
    """Commit whatever is there and push it; (before, after)."""
    before = repos.head()
    git(repos.work, "add", "-A")
    git(repos.work, "commit", "-q", "--allow-empty", "-m", message)
    git(repos.work, "push", "-q", "--force", "origin", "HEAD:main")
    return before, repos.head()


def test_two_thousand_commits_in_one_push(repos: Repositories, target: Target) -> None:
    """One parameter changes in the middle of them; the ends are compared, not the steps."""
    before = repos.head()
    lines = []
    for n in range(2000):
        text = f"note {n}\n"
        lines.append(
            f"commit refs/heads/main\ncommitter t <t@localhost> {1_800_000_000 + n} +0000\ndata 1\nx\n"
            + (f"from {before}\n" if n == 0 else "")
            + f"M 100644 inline notes.md\ndata {len(text)}\n{text}\n"
        )
    subprocess.run(["git", "fast-import", "--quiet"], cwd=repos.work, input="".join(lines).encode(), check=True)
    git(repos.work, "reset", "-q", "--hard", "main")
    git(repos.work, "push", "-q", "origin", "main")
    assert int(git(repos.work, "rev-list", "--count", f"{before}..HEAD")) == 2000
    assert told(target, before, repos.head()).state == "nothing"
    entry = told(target, *repos.edit("seed = 7", "seed = 8"))
    assert (entry.state, entry.reason) == ("started", "[train] seed changed")


@pytest.mark.parametrize(
    "name",
    ["two words.md", "line\nbreak.md", "tab\t.md", "\u00fcn\u00efc\u00f6de \U0001f600.md", "-rf", "a\\b", '"q".md'],
)
def test_names_that_git_quotes(repos: Repositories, target: Target, name: str) -> None:
    (repos.work / name).write_text("words\n")
    entry = told(target, *pushed(repos))
    assert (entry.state, entry.action) == ("nothing", "nothing")


def test_code_under_a_name_that_git_quotes(repos: Repositories, target: Target) -> None:
    """A file that the model reads counts, whatever it is called."""
    (repos.work / "l\u00e4bels und so.txt").write_text("a\n")
    text = (repos.work / "pipeline.toml").read_text()
    listed = text.replace('module = "digits.py"', 'module = "digits.py"\nfiles = ["l\u00e4bels und so.txt"]')
    assert listed != text
    (repos.work / "pipeline.toml").write_text(listed)
    assert told(target, *pushed(repos)).reason == "code changed"
    (repos.work / "l\u00e4bels und so.txt").write_text("b\n")
    assert told(target, *pushed(repos)).reason == "code changed"


def test_a_submodule_beside_the_project(repos: Repositories, target: Target, tmp_path: Path) -> None:
    """It is no input of a run: it starts nothing and is not fetched, wherever its URL leads."""
    head = repos.head()
    (repos.work / ".gitmodules").write_text('[submodule "x"]\n\tpath = x\n\turl = file:///no/such/place\n')
    git(repos.work, "update-index", "--add", "--cacheinfo", f"160000,{head},x")
    git(repos.work, "add", ".gitmodules")
    git(repos.work, "commit", "-qm", "submodule")
    git(repos.work, "push", "-q", "origin", "main")
    entry = told(target, head, repos.head())
    assert (entry.state, entry.action) == ("nothing", "nothing")


def test_code_that_lives_in_a_submodule_is_refused_with_the_reason(repos: Repositories, target: Target) -> None:
    """Its content is in no commit of this repository, so no run could be told which it was."""
    before = repos.head()
    git(repos.work, "rm", "-q", "--cached", "digits.py")
    git(repos.work, "update-index", "--add", "--cacheinfo", f"160000,{before},digits.py")
    git(repos.work, "commit", "-qm", "moved away")
    git(repos.work, "push", "-q", "origin", "HEAD:main")
    entry = told(target, before, repos.head())
    assert entry.state == "refused" and "digits.py" in entry.reason


def test_a_forced_push_whose_base_nobody_knows_any_more(
    repos: Repositories, target: Target, prefect: FakePrefect
) -> None:
    """The forge names a commit that is gone: there is nothing to compare with, so the plan of a run decides."""
    after = pushed(repos, "rewritten")[1]
    entry = told(target, "d" * 40, after)
    assert (entry.state, entry.action) == ("started", "retrain") and "nothing to compare with" in entry.reason
    assert prefect.started() == [(after, "SCHEDULED")]


def test_a_history_without_a_common_ancestor(repos: Repositories, target: Target) -> None:
    before = repos.head()
    git(repos.work, "checkout", "-q", "--orphan", "again")
    git(repos.work, "commit", "-qm", "a new beginning")
    git(repos.work, "push", "-q", "--force", "origin", "again:main")
    entry = told(target, before, repos.head())
    assert (entry.state, entry.action) == ("nothing", "nothing"), "the same files ask for nothing"


def test_a_commit_that_never_was(repos: Repositories, target: Target) -> None:
    push_id, _ = target.queue.add(Push(repository="acme/digits", branch="main", before=ZERO, after="e" * 40))
    entry = wait_for(target, push_id, 1.0)
    assert entry.state == "waiting" and "cannot be fetched" in entry.reason


def test_two_branches_at_once(repos: Repositories, target: Target, prefect: FakePrefect) -> None:
    """Each has its own last commit to compare with, and its own run."""
    file = repos.checkout / "pipeline.toml"
    file.write_text(file.read_text().replace("repository =", 'branches = ["main", "release/2"]\nrepository ='))
    target = open_target(str(file), "laptop")
    main = repos.edit("seed = 7", "seed = 8")
    git(repos.work, "checkout", "-q", "-b", "release/2")
    before, after = repos.edit("seed = 8", "seed = 9")
    for branch, move in (("main", main), ("release/2", (before, after))):
        target.queue.add(Push(repository="acme/digits", branch=branch, before=move[0], after=move[1]))
    assert sorted(e.state for e in drain(target)) == ["started", "started"]
    assert sorted(rev for rev, _ in prefect.started()) == sorted([main[1], after])
