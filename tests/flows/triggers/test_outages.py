"""The receiver killed, Prefect away: each push is one run, and a flow that trains meanwhile goes on."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from flows.push_queue import PushQueue
from tests.flows.push_kit import payload
from tests.flows.triggers.laptop_kit import Project, Receiver, decided, pushed_runs, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0, 1.4, 2.0])
def test_killed_between_receipt_and_hand_over_it_is_one_run(project: Project, receiver: Receiver, delay: float) -> None:
    """The worker's own loop is stopped for it, so that only the receiver decides."""
    worker = project.worker()
    queue = PushQueue(project.folder / ".reprise" / "push" / "digits.db")
    while True:
        os.kill(worker, signal.SIGSTOP)
        with queue.turn() as free:  # stopped in the middle of its turn, it would keep everybody from theirs
            if free:
                break
        os.kill(worker, signal.SIGCONT)
        time.sleep(0.05)
    try:
        before, after = project.change("shift = 1", f"shift = 1  # {delay}")
        before, after = project.change("learning_rate = 0.00", f"learning_rate = 0.00{int(delay * 10)}")
        assert receiver.post(payload(before, after)) == (202, "accepted")
        time.sleep(delay)
        receiver.kill()
        receiver.start()
        assert receiver.post(payload(before, after)) == (200, "duplicate")
        assert decided(project, after)["state"] == "started"
        (run,) = pushed_runs(project, after)
        project.prefect.set_state(run["id"], "CANCELLED", "Cancelled", "by test")
    finally:
        os.kill(worker, signal.SIGCONT)


def test_prefect_away_for_a_minute(project: Project, receiver: Receiver) -> None:
    """Two branches, a burst, redeliveries, and the receiver killed in the middle: one run for each cause."""
    project.kill_prefect()
    began = time.monotonic()
    a = project.change("dropout = 0.25", "dropout = 0.3")
    assert receiver.post(payload(*a)) == (202, "accepted")
    time.sleep(15)
    waiting = json.loads(project.command("hook", "list", "--json"))[0]
    assert waiting["state"] == "waiting" and "does not answer" in waiting["reason"]
    assert receiver.post(payload(*a)) == (200, "duplicate")
    b = project.change("dropout = 0.3", "dropout = 0.35")
    assert receiver.post(payload(*b)) == (202, "accepted")
    receiver.kill()
    receiver.start()
    c = project.change_on("next", "dropout = 0.35", "dropout = 0.4")
    assert receiver.post(payload(*c, ref="refs/heads/next")) == (202, "accepted")
    time.sleep(max(0.0, 61 - (time.monotonic() - began)))
    pushes = {e["push"]["after"]: e["state"] for e in json.loads(project.command("hook", "list", "--json"))}
    assert [pushes[after] for _, after in (a, b, c)] == ["waiting"] * 3
    away = time.monotonic() - began
    project.command("up")
    ends = [decided(project, after, 90) for _, after in (a, b, c)]
    print(f"Prefect was away for {away:.0f} s; then: {[e['state'] for e in ends]}")
    assert [e["state"] for e in ends] == ["superseded", "started", "started"]
    for delivery in (payload(*a), payload(*b), payload(*c, ref="refs/heads/next")):
        assert receiver.post(delivery) == (200, "duplicate")
    time.sleep(3)
    assert [len(pushed_runs(project, after)) for _, after in (a, b, c)] == [0, 1, 1]
    for entry in ends[1:]:
        project.wait(entry["flow_run"], "Completed", seconds=200)
        assert project.document(entry["flow_run"])["git_sha"] == entry["push"]["after"]


@pytest.mark.long
def test_a_flow_that_trains_outlives_a_server_that_is_away_for_long(project: Project) -> None:
    """Longer than three heartbeats: Prefect takes it for dead and takes its slot back; it goes on all the same."""
    versions = len(project.versions())
    flow_run = project.start(rev="origin/main", train={"epochs": 400, "seed": 60})
    until(lambda: project.trained_steps(flow_run) > 60, 90, "it trains")
    project.kill_prefect()
    time.sleep(110)
    project.command("up")
    project.wait(flow_run, "Completed", seconds=300)
    document = project.document(flow_run)
    print(f"attempts: {[(a['cause'], a['steps_lost']) for a in document['attempts']]}")
    assert document["status"] == "succeeded"
    assert all(a["steps_lost"] == 0 for a in document["attempts"])
    assert len(project.versions()) == versions + 1
