"""From a push to a run: real git repositories, real kills, and a Prefect that is away or answers into the void."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from flows.push_handover import Target, drain, hand_over, local_push, open_target, sentence, wait_for
from flows.push_queue import ZERO, Entry, Push
from tests.flows.push_kit import FakePrefect, Repositories, git


def told(target: Target, before: str, after: str, *, body: str = "") -> Entry:
    """A push as a receiver keeps it, decided."""
    push = Push(repository="acme/digits", branch="main", before=before, after=after, body=body or f"{before}{after}")
    push_id, _ = target.queue.add(push)
    return wait_for(target, push_id, 20)


def test_documentation_starts_nothing_and_a_parameter_does(
    repos: Repositories, target: Target, prefect: FakePrefect
) -> None:
    entry = told(target, *repos.edit("# Digits", "# The digits", "notes.md"))
    assert (entry.state, entry.action, entry.flow_run) == ("nothing", "nothing", "")
    entry = told(target, *repos.edit("seed = 7", "seed = 8"))
    assert (entry.state, entry.action, entry.reason) == ("started", "retrain", "[train] seed changed")
    assert prefect.started() == [(repos.head(), "SCHEDULED")]
    run = prefect.runs[entry.flow_run]
    assert run["parameters"] == {"rev": repos.head(), "cause": "push"}
    assert run["name"] == f"digits {repos.head()[:7]} push"
    assert run["idempotency_key"] == f"acme/digits@{repos.head()}:digits"
    assert "retrain, because [train] seed changed" in sentence(entry)


def test_of_a_burst_the_newest_counts_and_nothing_between_is_forgotten(
    repos: Repositories, target: Target, prefect: FakePrefect
) -> None:
    """Ten pushes: the first changes a parameter, the others only words; one run, at the last commit, a retraining."""
    moves = [repos.edit("seed = 7", "seed = 9")]
    moves += [repos.edit("# ", f"# {n} ", "notes.md") for n in range(9)]
    for before, after in moves:
        target.queue.add(Push(repository="acme/digits", branch="main", before=before, after=after))
    drain(target)
    states = [e.state for e in reversed(target.queue.entries())]
    assert states == ["superseded"] * 9 + ["started"]
    assert target.queue.entries()[0].action == "retrain"
    assert prefect.started() == [(repos.head(), "SCHEDULED")]


def test_a_burst_is_waited_for_but_not_for_ever(repos: Repositories, prefect: FakePrefect) -> None:
    text = (repos.checkout / "pipeline.toml").read_text()
    (repos.checkout / "pipeline.toml").write_text(text.replace('settle = "0s"', 'settle = "30s"'))
    target = open_target(str(repos.checkout / "pipeline.toml"), "laptop")
    before, after = repos.edit("seed = 7", "seed = 8")
    target.queue.add(Push(repository="acme/digits", branch="main", before=before, after=after))
    assert drain(target) == []
    import sqlite3

    db = sqlite3.connect(target.queue.path)
    db.execute("UPDATE pushes SET received = received - 61")
    db.commit()
    db.close()
    assert [e.state for e in drain(target)] == ["started"]


def test_a_newer_push_cancels_the_run_that_still_waits_and_not_one_that_runs(
    repos: Repositories, target: Target, prefect: FakePrefect
) -> None:
    for seed in (7, 8, 9):
        entry = told(target, *repos.edit(f"seed = {seed}", f"seed = {seed + 1}"))
        if seed == 7:
            prefect.runs[entry.flow_run]["state"] = {"type": "RUNNING"}
    assert [state for _, state in prefect.started()] == ["RUNNING", "CANCELLED", "SCHEDULED"]


def test_a_late_delivery_is_older_than_what_was_started(
    repos: Repositories, target: Target, prefect: FakePrefect
) -> None:
    first, second = repos.edit("seed = 7", "seed = 8"), repos.edit("seed = 8", "seed = 9")
    assert told(target, *second).state == "started"
    late = told(target, *first)
    assert late.state == "superseded" and second[1][:7] in late.reason
    assert prefect.started() == [(second[1], "SCHEDULED")]


def test_two_late_deliveries_in_the_wrong_order(repos: Repositories, target: Target, prefect: FakePrefect) -> None:
    first, second = repos.edit("seed = 7", "seed = 8"), repos.edit("seed = 8", "seed = 9")
    for before, after in (second, first):
        target.queue.add(Push(repository="acme/digits", branch="main", before=before, after=after))
    drain(target)
    assert prefect.started() == [(second[1], "SCHEDULED")]


def test_a_forced_push_back_is_a_cause_of_its_own(repos: Repositories, target: Target, prefect: FakePrefect) -> None:
    """A run for A, one for B, and when somebody goes back from B to A by force, another for A; once, though copied."""
    start = repos.head()
    a = repos.edit("seed = 7", "seed = 8")
    b = repos.edit("seed = 8", "seed = 9")
    assert told(target, start, a[1]).state == "started"
    assert told(target, *b).state == "started"
    git(repos.work, "reset", "-q", "--hard", a[1])
    git(repos.work, "push", "-q", "--force", "origin", "HEAD")
    assert told(target, b[1], a[1]).state == "started"
    assert told(target, b[1], a[1], body="a redelivery").state == "started"
    assert [rev for rev, _ in prefect.started()] == [a[1], b[1], a[1]]


def test_a_forced_push_aside_compares_with_what_was_decided(
    repos: Repositories, target: Target, prefect: FakePrefect
) -> None:
    start = repos.head()
    told(target, *repos.edit("seed = 7", "seed = 8"))
    git(repos.work, "reset", "-q", "--hard", start)
    entry = told(target, repos.head("origin/main"), repos.edit("# Digits", "# Numbers", "notes.md")[1])
    assert (entry.action, entry.reason) == ("retrain", "[train] seed changed"), "back to seed 7 counts"


def test_a_merge_is_one_push(repos: Repositories, target: Target, prefect: FakePrefect) -> None:
    start = repos.head()
    git(repos.work, "checkout", "-qb", "next")
    repos.edit("seed = 7", "seed = 8")
    git(repos.work, "checkout", "-q", "main")
    repos.edit("# Digits", "# Numbers", "notes.md")
    before = repos.head()
    told(target, start, before)
    git(repos.work, "merge", "-q", "--no-edit", "next")
    git(repos.work, "push", "-q", "origin", "main")
    entry = told(target, before, repos.head())
    assert (entry.state, entry.reason) == ("started", "[train] seed changed")
    assert prefect.started() == [(repos.head(), "SCHEDULED")]


def test_a_new_branch_is_left_to_the_plan(repos: Repositories, target: Target) -> None:
    assert told(target, ZERO, repos.head()).action == "retrain"


def test_a_commit_that_cannot_run_is_refused_with_the_reason(
    repos: Repositories, target: Target, prefect: FakePrefect
) -> None:
    entry = told(target, *repos.edit("[gate]", "[gait]"))
    assert entry.state == "refused"
    assert "[gait]: unknown section" in entry.reason
    entry = told(target, *repos.edit("[gait]", "[gate]"))
    assert entry.state == "nothing" or entry.state == "started"
    assert prefect.runs == {} or prefect.started()[0][0] == repos.head()


def test_what_is_pushed_does_not_decide_what_may_start(repos: Repositories, target: Target) -> None:
    """[push] of the checkout counts: a commit that adds a branch to the list opens nothing."""
    before, after = repos.edit('repository = "acme/digits"', 'repository = "acme/digits"\nbranches = ["main", "evil"]')
    assert told(target, before, after).state == "nothing"
    assert local_push(target, before, after, "refs/heads/evil")[0] is None


def test_the_working_tree_and_its_branches_are_left_alone(repos: Repositories, target: Target) -> None:
    before = git(repos.checkout, "for-each-ref", "refs/heads"), git(repos.checkout, "rev-parse", "HEAD")
    told(target, *repos.edit("seed = 7", "seed = 8"))
    assert (git(repos.checkout, "for-each-ref", "refs/heads"), git(repos.checkout, "rev-parse", "HEAD")) == before
    assert git(repos.checkout, "status", "--porcelain", "--untracked-files=no") == ""


def test_prefect_away_is_waited_for(repos: Repositories, target: Target, prefect: FakePrefect) -> None:
    prefect.stop()
    before, after = repos.edit("seed = 7", "seed = 8")
    push_id, _ = target.queue.add(Push(repository="acme/digits", branch="main", before=before, after=after))
    entry = wait_for(target, push_id, 0.5)
    assert entry.state == "waiting" and "does not answer" in entry.reason and entry.tries >= 1
    prefect.start()
    assert wait_for(target, push_id, 20).state == "started"
    assert len(prefect.runs) == 1


def test_the_remote_away_is_waited_for(repos: Repositories, target: Target, prefect: FakePrefect) -> None:
    move = repos.edit("seed = 7", "seed = 8")
    away = repos.bare.rename(repos.bare.with_name("away.git"))
    push_id, _ = target.queue.add(Push(repository="acme/digits", branch="main", before=move[0], after=move[1]))
    entry = wait_for(target, push_id, 0.5)
    assert entry.state == "waiting" and "cannot be fetched" in entry.reason
    away.rename(repos.bare)
    assert wait_for(target, push_id, 20).state == "started"


def test_an_answer_that_is_lost_does_not_make_two_runs(
    repos: Repositories, target: Target, prefect: FakePrefect
) -> None:
    prefect.drop_answers = 2
    entry = told(target, *repos.edit("seed = 7", "seed = 8"))
    assert entry.state == "started"
    assert (prefect.asked, len(prefect.runs)) == (3, 1)


def test_it_registers_the_pipeline_if_nobody_did(repos: Repositories, target: Target, prefect: FakePrefect) -> None:
    prefect.deployed = False
    assert told(target, *repos.edit("seed = 7", "seed = 8")).state == "started"


# Where the process that decides is killed: before the fetch, after the comparison, after Prefect's answer.
POINTS = {
    "after it was kept": "flows.push_handover.fetch_commit",
    "after the fetch": "flows.push_handover._compare",
    "before Prefect is asked": "flows.push_handover.hand_over",
    "before the record": "flows.push_queue.PushQueue.decide",
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_between_receipt_and_record_it_is_one_run(
    repos: Repositories, target: Target, prefect: FakePrefect, point: str
) -> None:
    before, after = repos.edit("seed = 7", "seed = 8")
    program = (
        "import importlib, os, signal, sys\n"
        "from unittest.mock import patch\n"
        "from flows.push_handover import drain, open_target\n"
        "from flows.push_queue import Push\n"
        "target = open_target(sys.argv[1], 'laptop')\n"
        "target.queue.add(Push(repository='acme/digits', branch='main', before=sys.argv[2], after=sys.argv[3]))\n"
        "patch(sys.argv[4], lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)).start()\n"
        "drain(target)\n"
    )
    argv = [sys.executable, "-c", program, str(target.settings.file), before, after, POINTS[point]]
    assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL
    assert [e.state for e in target.queue.entries()] == ["waiting"]
    assert [e.state for e in drain(target)] == ["started"]
    assert prefect.started() == [(after, "SCHEDULED")]


def test_two_at_once_decide_once(repos: Repositories, target: Target, prefect: FakePrefect) -> None:
    before, after = repos.edit("seed = 7", "seed = 8")
    target.queue.add(Push(repository="acme/digits", branch="main", before=before, after=after))
    program = (
        "import sys; from flows.push_handover import drain, open_target\n"
        "print(len(drain(open_target(sys.argv[1], 'laptop'))))"
    )
    argv = [sys.executable, "-c", program, str(target.settings.file)]
    several = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    decided = [int(p.communicate()[0]) for p in several]
    assert sorted(decided) == [0, 0, 1]
    assert prefect.asked == 1


@pytest.mark.parametrize(
    ("ref", "after", "why"),
    [
        ("refs/tags/v1", "1" * 40, "is no branch"),
        ("refs/heads/main", ZERO, "deleted"),
        ("refs/heads/next", "1" * 40, "not listed"),
    ],
)
def test_what_a_hook_tells_and_starts_nothing(target: Target, ref: str, after: str, why: str) -> None:
    push, said = local_push(target, ZERO, after, ref)
    assert push is None and why in said


def test_hand_over_asks_for_the_same_run_again(repos: Repositories, target: Target, prefect: FakePrefect) -> None:
    before, after = repos.edit("seed = 7", "seed = 8")
    target.queue.add(Push(repository="acme/digits", branch="main", before=before, after=after))
    (entry,) = target.queue.waiting()
    assert hand_over(target, entry) == hand_over(target, entry)


def test_a_real_push_through_the_shipped_hook(repos: Repositories, target: Target, prefect: FakePrefect) -> None:
    """git push -> bare repository -> the shipped post-receive -> reprise hook push; the pusher reads the decision."""
    repos.install_hook()
    env = {**os.environ, "REPRISE": f"{sys.executable} -m flows", "REPRISE_PIPELINE": str(target.settings.file)}
    text = (repos.work / "pipeline.toml").read_text()
    (repos.work / "pipeline.toml").write_text(text.replace("seed = 7", "seed = 8"))
    git(repos.work, "commit", "-qam", "seed")
    began = time.monotonic()
    done = subprocess.run(
        ["git", "push", "origin", "main"], cwd=repos.work, env=env, capture_output=True, text=True, check=True
    )
    assert "remote: digits: main" in done.stderr and "[train] seed changed" in done.stderr, done.stderr
    assert time.monotonic() - began < 20
    assert prefect.started() == [(repos.head(), "SCHEDULED")]


def test_a_hook_that_fails_does_not_fail_the_push(repos: Repositories, prefect: FakePrefect) -> None:
    repos.install_hook()
    repos_env = {**os.environ, "REPRISE": "/no/such/reprise", "REPRISE_PIPELINE": "/no/such/pipeline.toml"}
    git(repos.work, "commit", "-q", "--allow-empty", "-m", "x")
    argv = ["git", "push", "origin", "main"]
    done = subprocess.run(argv, cwd=repos.work, env=repos_env, capture_output=True, text=True, check=True)
    assert "reprise: " in done.stderr
    with socket.socket():
        assert prefect.runs == {}
