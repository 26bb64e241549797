"""The decision said at the forge: what is said when, once, later when the forge is away, and never at a run's cost."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import flows.push_forges
import flows.push_status
from flows.push_handover import Target, drain, open_target
from flows.push_queue import Entry, Push, State
from flows.push_status import PATIENCE, StatusLog, report, report_forever, repository_of, status_of
from tests.flows.forge_kit import TOKEN, FakeForge
from tests.flows.push_kit import FakePrefect, Repositories

NOW = 1_800_000_000.0


def entry(state: State, action: str = "", reason: str = "[train] seed changed", flow_run: str = "") -> Entry:
    push = Push(repository="acme/digits", branch="main", before="a" * 40, after="b" * 40)
    return Entry(
        id=push.cause, number=1, push=push, received=NOW - 5, state=state, action=action, reason=reason,
        flow_run=flow_run, tries=0, next_try=0.0,
    )  # fmt: skip


def run(kind: str, name: str = "", message: str = "", age: float = 5.0) -> dict[str, Any]:
    since = datetime.datetime.fromtimestamp(NOW - age, datetime.UTC).isoformat()
    return {"state": {"type": kind, "name": name or kind.title(), "message": message, "timestamp": since}}


STARTED = entry("started", "retrain", flow_run="r1")
SEED = "[train] seed changed"
SAID = {
    "not decided yet": (entry("waiting"), {}, None, False),
    "documentation": (entry("nothing", "nothing", "no key"), {}, ("success", "Nothing to do: no key"), True),
    "superseded": (entry("superseded", reason="bbb is newer"), {}, ("success", "Skipped: bbb is newer"), True),
    "refused": (entry("refused", reason="p.toml:3: no"), {}, ("failure", "Refused: p.toml:3: no"), True),
    "waits for the worker": (STARTED, run("SCHEDULED"), ("running", f"Retraining: {SEED}"), False),
    "trains": (STARTED, run("RUNNING"), ("running", f"Retraining: {SEED}"), False),
    "Prefect is away": (STARTED, {}, ("running", f"Retraining: {SEED}"), False),
    "a person is asked": (STARTED, run("PAUSED"), ("running", f"Retraining, waits for approval: {SEED}"), False),
    "done": (STARTED, run("COMPLETED"), ("success", f"Retrained: {SEED}"), True),
    "redeployed": (replace(STARTED, action="redeploy"), run("COMPLETED"), ("success", f"Redeployed: {SEED}"), True),
    "failed": (STARTED, run("FAILED"), ("failure", f"Retraining failed: {SEED}"), False),
    "crashed just now": (STARTED, run("CRASHED"), ("running", f"Retraining: {SEED}"), False),
    "crashed for good": (STARTED, run("CRASHED", age=90), ("failure", f"Retraining failed: {SEED}"), False),
    "cancelled": (STARTED, run("CANCELLED"), ("cancelled", f"Retraining was cancelled: {SEED}"), False),
    "a newer push": (STARTED, run("CANCELLED", "Superseded", "by ccc."), ("success", "Skipped: by ccc."), True),
    "deleted": (STARTED, None, ("cancelled", "Retraining was cancelled: the run was deleted"), True),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_is_said(case: str) -> None:
    about, flow_run, expected, closed = SAID[case]
    status, last = status_of(about, flow_run, url="http://p/runs/r1", now=NOW)
    assert (status and (status.word, status.description), last) == (expected, closed)


def test_a_push_that_waits_long_says_so() -> None:
    status, last = status_of(replace(entry("waiting"), received=NOW - 60), {}, url="", now=NOW)
    assert status and (status.word, status.description, last) == ("waiting", "Waits to be decided", False)


@pytest.fixture
def forge() -> Iterator[FakeForge]:
    with FakeForge("github") as fake:
        yield fake


@pytest.fixture
def target(repos: Repositories, forge: FakeForge, monkeypatch: pytest.MonkeyPatch) -> Target:
    file = repos.checkout / "pipeline.toml"
    ours = f'\n[push.status]\nforge = "{forge.kind}"\nurl = "{forge.url}"\nprefect = "https://prefect.example"\n'
    file.write_text(file.read_text() + ours)
    monkeypatch.setenv("REPRISE_FORGE_TOKEN", TOKEN)
    return open_target(str(file), "laptop")


@pytest.fixture
def log(target: Target) -> StatusLog:
    return StatusLog(target.queue.path.with_suffix(".status.db"))


def push(repos: Repositories, target: Target, old: str, new: str, file: str = "pipeline.toml") -> str:
    before, after = repos.edit(old, new, file)
    target.queue.add(Push(repository="acme/digits", branch="main", before=before, after=after))
    drain(target)
    return after


def state(prefect: FakePrefect, kind: str) -> None:
    """Of the newest run."""
    now = datetime.datetime.now(datetime.UTC).isoformat()
    list(prefect.runs.values())[-1]["state"] = {"type": kind, "name": kind.title(), "message": "", "timestamp": now}


def test_pending_then_success_and_each_once(
    repos: Repositories, target: Target, prefect: FakePrefect, forge: FakeForge, log: StatusLog
) -> None:
    after = push(repos, target, "seed = 7", "seed = 8")
    for _ in range(3):
        assert report(target, log, repository_of(target)) == []
    assert forge.words() == [("pending", "Retraining: [train] seed changed")]
    assert forge.said[0]["sha"] == after and forge.said[0]["context"] == "reprise/digits"
    assert forge.said[0]["target_url"] == "https://prefect.example/runs/flow-run/run-1"
    state(prefect, "FAILED")
    report(target, log, repository_of(target))
    state(prefect, "RUNNING")  # somebody retried it
    report(target, StatusLog(log.path), repository_of(target))
    state(prefect, "COMPLETED")
    for _ in range(3):
        report(target, log, repository_of(target))
    assert [s["state"] for s in forge.said] == ["pending", "failure", "pending", "success"]
    assert forge.words()[-1] == ("success", "Retrained: [train] seed changed")
    state(prefect, "FAILED")
    report(target, log, repository_of(target))
    assert forge.asked == 4, "what has ended well is not looked after any more"


def test_each_push_of_a_burst_gets_its_own(
    repos: Repositories, target: Target, forge: FakeForge, log: StatusLog
) -> None:
    moves = [repos.edit("# ", f"# {n} ", "notes.md") for n in range(2)]
    for before, after in moves:
        target.queue.add(Push(repository="acme/digits", branch="main", before=before, after=after))
    drain(target)
    report(target, log, repository_of(target))
    assert [(s["sha"], s["state"]) for s in forge.said] == [(after, "success") for _, after in moves]
    assert "is newer" in forge.said[0]["description"] and "Nothing to do" in forge.said[1]["description"]


def test_a_forge_that_is_away_hears_later_and_holds_up_nothing(
    repos: Repositories, target: Target, prefect: FakePrefect, forge: FakeForge, log: StatusLog
) -> None:
    forge.stop()
    push(repos, target, "seed = 7", "seed = 8")
    push(repos, target, "seed = 8", "seed = 9")
    assert [s for _, s in prefect.started()] == ["CANCELLED", "SCHEDULED"], "the runs do not wait for the forge"
    (told,) = report(target, log, repository_of(target))
    assert "does not answer" in told and "the run goes on" in told and TOKEN not in told
    assert log.read(1).tries == 1 and log.read(2).tries == 0, "one timeout a look, not one for each push"
    assert report(target, log, repository_of(target)) != [], "the other one is tried"
    assert report(target, log, repository_of(target)) == [], "and both wait now"
    forge.start()
    time.sleep(1.1)
    report(target, log, repository_of(target))
    assert sorted(s["state"] for s in forge.said) == ["pending", "success"]


@pytest.mark.parametrize(("code", "headers", "waits"), [(429, {"Retry-After": "40"}, 40), (500, {}, 1)])
def test_it_waits_as_long_as_it_is_asked_to(
    repos: Repositories,
    target: Target,
    forge: FakeForge,
    log: StatusLog,
    code: int,
    headers: dict[str, str],
    waits: int,
) -> None:
    push(repos, target, "seed = 7", "seed = 8")
    forge.trouble = [(code, headers)]
    assert len(report(target, log, repository_of(target))) == 1
    assert log.read(1).next_try == pytest.approx(time.time() + waits, abs=2)
    assert report(target, log, repository_of(target)) == [] and forge.asked == 1


def test_it_asks_ever_more_rarely(repos: Repositories, target: Target, forge: FakeForge, log: StatusLog) -> None:
    push(repos, target, "seed = 7", "seed = 8")
    forge.always = (503, {})
    waits = []
    for _ in range(10):
        began = time.time()
        report(target, log, repository_of(target))
        record = log.read(1)
        waits.append(round(record.next_try - began))
        log.write(1, replace(record, next_try=0.0))
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
    forge.always = None
    report(target, log, repository_of(target))
    assert [s["state"] for s in forge.said] == ["pending"] and log.read(1).tries == 0


def test_what_it_will_never_take_is_told_and_left(
    repos: Repositories, target: Target, forge: FakeForge, log: StatusLog
) -> None:
    after = push(repos, target, "seed = 7", "seed = 8")
    forge.trouble = [(422, {})]
    (told,) = report(target, log, repository_of(target))
    assert after[:7] in told and "422" in told and told.endswith("not said")
    assert report(target, log, repository_of(target)) == [] and forge.asked == 1


def looks(target: Target, count: int) -> list[str]:
    """What the loop tells in so many looks."""
    told: list[str] = []
    left = iter(range(count))
    report_forever(target, lambda seconds: next(left, None) is None, told.append)
    return told


def test_a_token_that_may_not_is_told_once_with_the_fix(
    repos: Repositories, target: Target, prefect: FakePrefect, forge: FakeForge, log: StatusLog
) -> None:
    forge.always = (403, {})
    push(repos, target, "seed = 7", "seed = 8")
    push(repos, target, "# Digits", "# Numbers", "notes.md")
    (told,) = looks(target, 3)
    assert told.startswith("digits: [push.status] ") and "403" in told and "Commit statuses: write" in told
    assert forge.asked == 2 and [s for _, s in prefect.started()] == ["SCHEDULED"]
    forge.always = None  # somebody gave it the right
    for number in (1, 2):
        log.write(number, replace(log.read(number), next_try=0.0))
    assert looks(target, 1) == []
    assert [s["state"] for s in forge.said] == ["pending", "success"]


def test_no_token_is_told_once(repos: Repositories, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REPRISE_FORGE_TOKEN")
    (told,) = looks(target, 3)
    assert "[push.status] token" in told and "REPRISE_FORGE_TOKEN is not set" in told


def test_off_by_default(repos: Repositories, prefect: FakePrefect) -> None:
    target = open_target(str(repos.checkout / "pipeline.toml"), "laptop")
    push(repos, target, "seed = 7", "seed = 8")
    report_forever(target, lambda seconds: pytest.fail("it looked"), lambda line: pytest.fail(line))


def test_two_processes_say_it_once(repos: Repositories, target: Target, forge: FakeForge) -> None:
    """The receiver and `reprise serve` both look."""
    push(repos, target, "seed = 7", "seed = 8")
    forge.trouble = [0.3]
    threads = [threading.Thread(target=looks, args=(target, 3)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [s["state"] for s in forge.said] == ["pending"]


def test_a_slow_forge_does_not_slow_the_hand_over(
    repos: Repositories, target: Target, prefect: FakePrefect, forge: FakeForge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows.push_forges, "TIMEOUT_SECONDS", 1.0)
    push(repos, target, "seed = 7", "seed = 8")
    forge.trouble = [2.0]
    thread = threading.Thread(target=looks, args=(target, 1))
    thread.start()
    began = time.monotonic()
    push(repos, target, "seed = 8", "seed = 9")
    assert len(prefect.runs) == 2 and time.monotonic() - began < 1.0 and thread.is_alive()
    thread.join()


def test_old_ones_are_let_go(repos: Repositories, target: Target, forge: FakeForge, log: StatusLog) -> None:
    import sqlite3

    push(repos, target, "seed = 7", "seed = 8")
    db = sqlite3.connect(target.queue.path)
    db.execute("UPDATE pushes SET received = received - ?", (PATIENCE + 1,))
    db.commit()
    db.close()
    assert report(target, log, repository_of(target)) == [] and forge.asked == 0


def test_no_folder_of_this_machine_in_public(
    repos: Repositories, target: Target, forge: FakeForge, log: StatusLog
) -> None:
    before, after = repos.edit("seed = 7", "seed = 8")
    target.queue.add(Push(repository="acme/digits", branch="main", before=before, after=after))
    reason = f"{target.project.root}/digits.py: no such file; {target.project.root}: dirty"
    target.queue.decide(target.queue.waiting()[0], "refused", reason=reason)
    report(target, log, repository_of(target))
    assert forge.words() == [("failure", "Refused: digits.py: no such file; the checkout: dirty")]
