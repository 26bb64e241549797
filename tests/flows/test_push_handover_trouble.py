"""Pushes that wait, and for how long: clocks that jump, commits that are gone, broken checkouts, poisoned files."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flows.push_handover import LEAST_TRIES, LONGEST_PAUSE, REMOTE_PATIENCE, Target, drain, open_target, sentence
from flows.push_queue import ZERO, Entry, Push, PushQueue
from tests.flows.push_kit import FakePrefect, Repositories, git

GONE = "e" * 40  # a commit that no repository has


def add(target: Target, before: str, after: str, branch: str = "main") -> str:
    return target.queue.add(Push(repository="acme/digits", branch=branch, before=before, after=after))[0]


def entry(target: Target, push_id: str) -> Entry:
    found = target.queue.find(push_id)
    assert found
    return found


def shift(queue: PushQueue, seconds: float, tries: int | None = None) -> None:
    """As if the clock, which the queue's times are from, had been put back by so much since."""
    with sqlite3.connect(queue.path) as db:
        db.execute("UPDATE pushes SET received = received + ?, next_try = next_try + ?", (seconds, seconds))
        if tries is not None:
            db.execute("UPDATE pushes SET tries = ?", (tries,))
    db.close()


def settling(repos: Repositories, seconds: int) -> Target:
    file = repos.checkout / "pipeline.toml"
    file.write_text(file.read_text().replace('settle = "0s"', f'settle = "{seconds}s"'))
    return open_target(str(file), "laptop")


def test_a_clock_that_is_put_back_while_a_push_settles(repos: Repositories, prefect: FakePrefect) -> None:
    target = settling(repos, 30)
    push_id = add(target, *repos.edit("seed = 7", "seed = 8"))
    assert drain(target) == []
    shift(target.queue, 3600)
    drain(target)
    assert entry(target, push_id).state == "started"


def test_a_clock_that_is_put_back_while_prefect_is_away(
    repos: Repositories, target: Target, prefect: FakePrefect
) -> None:
    push_id = add(target, *repos.edit("seed = 7", "seed = 8"))
    prefect.stop()
    drain(target)
    prefect.start()
    shift(target.queue, 3600)
    drain(target)
    assert entry(target, push_id).state == "started"


def test_a_clock_that_is_put_forward_refuses_nothing(repos: Repositories, target: Target) -> None:
    push_id = add(target, ZERO, GONE)
    drain(target)
    shift(target.queue, -REMOTE_PATIENCE - 3600)
    drain(target)
    assert entry(target, push_id).state == "waiting"


def test_a_commit_that_is_gone_for_a_day_is_refused(repos: Repositories, target: Target) -> None:
    push_id = add(target, ZERO, GONE)
    shift(target.queue, -REMOTE_PATIENCE - 1, tries=LEAST_TRIES)
    drain(target)
    assert entry(target, push_id).state == "refused" and "cannot be fetched" in entry(target, push_id).reason


@pytest.mark.parametrize("away", ["remote", "Prefect"])
def test_a_server_that_is_away_for_days_loses_no_push(
    repos: Repositories, target: Target, prefect: FakePrefect, away: str
) -> None:
    """Also after so many tries that no number holds the pause they would double to."""
    push_id = add(target, *repos.edit("seed = 7", "seed = 8"))
    elsewhere = repos.bare.with_name("away.git")
    repos.bare.rename(elsewhere) if away == "remote" else prefect.stop()
    shift(target.queue, -5 * REMOTE_PATIENCE, tries=5000)
    drain(target)
    assert entry(target, push_id).state == "waiting"
    assert 0 < entry(target, push_id).next_try - time.time() <= LONGEST_PAUSE / 4
    elsewhere.rename(repos.bare) if away == "remote" else prefect.start()
    shift(target.queue, -LONGEST_PAUSE)
    drain(target)
    assert entry(target, push_id).state == "started"


def test_a_commit_that_is_gone_does_not_hold_up_the_one_before(
    repos: Repositories, target: Target, prefect: FakePrefect
) -> None:
    """A late delivery of what a forced push has replaced: the remote does not have it any more."""
    before, after = repos.edit("seed = 7", "seed = 8")
    real, gone = add(target, before, after), add(target, before, GONE)
    drain(target)
    assert (entry(target, real).state, entry(target, gone).state) == ("started", "waiting")
    assert prefect.started() == [(after, "SCHEDULED")]


def test_a_commit_that_comes_later_is_run_then(repos: Repositories, target: Target, prefect: FakePrefect) -> None:
    """A forge that tells of a push before its git server has it."""
    elsewhere = repos.bare.with_name("mirror.git")
    git(repos.bare.parent, "clone", "-q", "--bare", str(repos.bare), str(elsewhere))
    first = repos.edit("seed = 7", "seed = 8")
    repos.bare.rename(repos.bare.with_name("ahead.git"))
    elsewhere.rename(repos.bare)
    push_id = add(target, *first)
    drain(target)
    assert entry(target, push_id).state == "waiting" and "cannot be fetched" in entry(target, push_id).reason
    repos.bare.rename(elsewhere)
    repos.bare.with_name("ahead.git").rename(repos.bare)
    shift(target.queue, -LONGEST_PAUSE)
    drain(target)
    assert entry(target, push_id).state == "started"


def test_a_checkout_that_is_broken_is_waited_for(repos: Repositories, target: Target, prefect: FakePrefect) -> None:
    """git's files are damaged on this machine: that is no fault of the push, and somebody can mend it."""
    push_id = add(target, *repos.edit("seed = 7", "seed = 8"))
    blob = git(repos.work, "rev-parse", "HEAD:pipeline.toml")
    git(repos.checkout, "fetch", "-q", "origin", "main")
    _unpacked(repos.checkout)
    loose = repos.checkout / ".git" / "objects" / blob[:2] / blob[2:]
    sound = loose.read_bytes()
    loose.chmod(0o644)
    loose.write_bytes(b"damaged")
    drain(target)
    found = entry(target, push_id)
    assert found.state == "waiting" and "expected a sound repository" in found.reason
    loose.write_bytes(sound)
    shift(target.queue, -LONGEST_PAUSE)
    drain(target)
    assert entry(target, push_id).state == "started"


def _unpacked(checkout: Path) -> None:
    """Every object a file of its own."""
    aside = checkout / "packs"
    for pack in list((checkout / ".git" / "objects" / "pack").glob("*")):
        aside.mkdir(exist_ok=True)
        pack.rename(aside / pack.name)
    import subprocess

    for pack in aside.glob("*.pack"):
        subprocess.run(["git", "unpack-objects", "-q"], cwd=checkout, input=pack.read_bytes(), check=True)


def test_what_nobody_foresaw_holds_up_no_other_branch(
    repos: Repositories, prefect: FakePrefect, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = repos.checkout / "pipeline.toml"
    file.write_text(file.read_text().replace("repository =", 'branches = ["main", "alpha"]\nrepository ='))
    target = open_target(str(file), "laptop")
    before, after = repos.edit("seed = 7", "seed = 8")
    poisoned, other = add(target, before, after, "alpha"), add(target, before, after, "main")
    import flows.push_handover

    decide = flows.push_handover._decide

    def poison(target: Target, entries: list[Entry]) -> None:
        if entries[-1].push.branch == "alpha":
            raise KeyError("what nobody foresaw")
        decide(target, entries)

    monkeypatch.setattr(flows.push_handover, "_decide", poison)
    drain(target)
    assert (entry(target, poisoned).state, entry(target, other).state) == ("waiting", "started")
    assert entry(target, poisoned).reason == "KeyError: 'what nobody foresaw'"
    assert drain(target) == [], "and it is not tried over and over"


POISON = {
    "not UTF-8": b"\xff\xfe[pipeline]",
    "a zero byte": b"[pipeline]\nname = 'x'\0",
    "deep": b"x = " + b"[" * 20_000,
    "long": b"#" * 5_000_000,
    "empty": b"",
    "another pipeline": b'[pipeline]\nname = "other"\n',
}


@pytest.mark.parametrize("case", POISON)
def test_files_that_cannot_be_read_are_refused_with_the_reason(repos: Repositories, target: Target, case: str) -> None:
    before = repos.head()
    (repos.work / "pipeline.toml").write_bytes(POISON[case])
    git(repos.work, "commit", "-qam", case)
    git(repos.work, "push", "-q", "origin", "HEAD:main")
    push_id = add(target, before, repos.head())
    drain(target)
    assert entry(target, push_id).state == "refused" and "pipeline.toml" in entry(target, push_id).reason


def test_a_reason_cannot_write_lines_of_its_own(repos: Repositories, target: Target) -> None:
    """Keys of a pushed file are quoted in the reason, which goes to logs and to terminals."""
    key = '"x\\u001b[2K\\r\\ndigits: main 1234567: retrain, because all is well"'
    push_id = add(target, *repos.edit("[gate]", f"[{key}]\n[gate]"))
    drain(target)
    found = entry(target, push_id)
    assert found.state == "refused" and "\x1b" in found.reason
    assert sentence(found).isprintable() and "\\x1b" in sentence(found) and "\\n" in sentence(found)
    assert sentence(replace(found, state="waiting")).isprintable()


def test_two_pipelines_of_one_folder_hear_of_each_push(repos: Repositories, prefect: FakePrefect) -> None:
    """Each has a queue of its own: what one has decided is still open for the other."""
    text = (repos.work / "pipeline.toml").read_text()
    (repos.work / "second.toml").write_text(text.replace('name = "digits"', 'name = "second"'))
    git(repos.work, "add", "-A")
    git(repos.work, "commit", "-qm", "a second pipeline")
    git(repos.work, "push", "-q", "origin", "HEAD:main")
    git(repos.checkout, "pull", "-q")
    targets = [open_target(str(repos.checkout / name), "laptop") for name in ("pipeline.toml", "second.toml")]
    assert [t.name for t in targets] == ["digits", "second"]
    before, after = repos.edit("import torch", "import torch  # as it was", "digits.py")
    for target in targets:
        add(target, before, after)
        assert [e.state for e in drain(target)] == ["started"]
    assert sorted(r["idempotency_key"] for r in prefect.runs.values()) == [
        f"acme/digits@{after}:digits", f"acme/digits@{after}:second",
    ]  # fmt: skip
