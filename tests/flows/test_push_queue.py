"""The queue of pushes: on disk before it is answered, once however often it comes, decided once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.push_queue import Push, PushQueue, Unusable

A, B, C = "a" * 40, "b" * 40, "c" * 40


def push(before: str = A, after: str = B, *, branch: str = "main", body: str = "1") -> Push:
    return Push(repository="acme/digits", branch=branch, before=before, after=after, body=body)


@pytest.fixture
def queue(tmp_path: Path) -> PushQueue:
    return PushQueue(tmp_path / "push" / "queue.db")


def test_a_push_waits_until_it_is_decided(queue: PushQueue) -> None:
    push_id, new = queue.add(push())
    assert new
    (entry,) = queue.waiting()
    assert (entry.id, entry.push, entry.state) == (push_id, push(), "waiting")
    queue.decide(entry, "started", action="retrain", reason="data changed", flow_run="f1")
    assert queue.waiting() == []
    found = queue.find(push_id)
    assert found is not None
    assert (found.state, found.action, found.reason, found.flow_run) == ("started", "retrain", "data changed", "f1")


def test_a_decision_stands(queue: PushQueue) -> None:
    queue.add(push())
    (entry,) = queue.waiting()
    queue.decide(entry, "nothing", reason="first")
    queue.decide(entry, "started", reason="second", flow_run="f2")
    queue.postpone(entry, 5, "third")
    (found,) = queue.entries()
    assert (found.state, found.reason, found.flow_run, found.tries) == ("nothing", "first", "", 0)


def test_a_copy_is_known_whatever_its_bytes(queue: PushQueue) -> None:
    first = queue.add(push(body="1"))
    assert queue.add(push(body="1")) == (first[0], False)
    assert queue.add(push(body="from another forge")) == (first[0], False)
    assert len(queue.entries()) == 1


def test_other_moves_are_other_causes(queue: PushQueue) -> None:
    moves = [push(A, B), push(B, C), push(A, B, branch="next"), push(B, A)]
    assert [queue.add(p)[1] for p in moves] == [True] * 4


def test_the_same_move_made_again_is_new_and_its_copies_are_not(queue: PushQueue) -> None:
    """Forward, back by force, forward again: the third is no redelivery of the first."""
    first, _ = queue.add(push(A, B, body="1"))
    queue.add(push(B, A, body="2"))
    again, new = queue.add(push(A, B, body="3"))
    assert new and again != first
    assert queue.add(push(A, B, body="3")) == (again, False)
    assert queue.add(push(A, B, body="1")) == (first, False), "a late copy of the first is still a copy"


def test_a_hundred_copies_at_once_are_one(queue: PushQueue) -> None:
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: queue.add(push()), range(100)))
    assert sum(new for _, new in answers) == 1
    assert len({push_id for push_id, _ in answers}) == 1
    assert len(queue.entries(1000)) == 1


def test_postponed_ones_stay_and_count_their_tries(queue: PushQueue) -> None:
    queue.add(push())
    queue.postpone(queue.waiting()[0], 30, "Prefect is away")
    queue.postpone(queue.waiting()[0], 30, "Prefect is away")
    (entry,) = queue.waiting()
    assert (entry.tries, entry.reason) == (2, "Prefect is away")
    assert entry.next_try > entry.received + 25


def test_what_the_next_push_is_compared_with(queue: PushQueue) -> None:
    for number, state in enumerate(("started", "nothing", "refused", "superseded")):
        queue.add(push(A, f"{number}" * 40, branch="main"))
        queue.decide(queue.waiting()[0], state)  # type: ignore[arg-type]
    queue.add(push(A, C, branch="other"))
    queue.decide(queue.waiting()[0], "started")
    last = queue.last_decided("main")
    assert last is not None and last.push.after == "1" * 40
    assert queue.last_decided("never") is None
    assert queue.started("0" * 40) and not queue.started("1" * 40)


def test_one_process_decides_at_a_time(queue: PushQueue) -> None:
    program = (
        "import sys; from pathlib import Path; from flows.push_queue import PushQueue\n"
        "with PushQueue(Path(sys.argv[1])).turn() as ours: print(ours)"
    )
    argv = [sys.executable, "-c", program, str(queue.path)]
    with queue.turn() as ours:
        assert ours
        assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "False\n"
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "True\n"


def _add_and_die(path: Path) -> None:
    PushQueue(path).add(push())
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_added_survives_kill_9(queue: PushQueue) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_add_and_die, args=(queue.path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert [entry.push for entry in queue.waiting()] == [push()]


def test_a_killed_add_leaves_the_queue_usable(queue: PushQueue) -> None:
    half = sqlite3.connect(queue.path, isolation_level=None)
    half.execute("BEGIN IMMEDIATE")
    half.execute("INSERT INTO pushes (id, push, branch, after, received) VALUES ('x', '{}', 'main', 'x', 0)")
    half.close()  # as its process' death would
    assert queue.add(push())[1]
    assert len(queue.entries()) == 1


@pytest.mark.parametrize("trouble", ["damaged", "held"])
def test_a_queue_that_cannot_be_used_says_so(queue: PushQueue, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.push_queue.BUSY_SECONDS", 0.1)
    holder = sqlite3.connect(queue.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    if trouble == "damaged":
        holder.close()
        queue.path.write_bytes(b"no database" * 1000)
    words = {"damaged": "file is not a database", "held": "database is locked"}[trouble]
    with pytest.raises(Unusable, match=f"the queue of pushes cannot be used: {words}; expected a sound file"):
        queue.add(push())
    holder.close()
