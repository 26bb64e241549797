"""Flows killed with -9: found by our own watch and by Prefect's automation, resumed once, one version."""

from __future__ import annotations

import os
import signal
import time

import pytest

from flows.triggers import HEARTBEAT_SECONDS, SILENCE_SECONDS
from flows.zombies import SILENCE
from tests.flows.triggers.laptop_kit import Project, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def kill(project: Project, flow_run: str) -> float:
    """The worker and the flow at once: nobody is left to say anything. Returns when."""
    victims = [project.worker(), *project.processes(flow_run)]
    assert len(victims) >= 2
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    assert project.state(flow_run) == "Running"
    return time.monotonic()


def test_our_own_watch_finds_it(project: Project) -> None:
    versions = len(project.versions())
    flow_run = project.start(rev="origin/main", train={"epochs": 25, "seed": 77})
    until(lambda: project.trained_steps(flow_run) > 60, 90, "it trains")
    killed = kill(project, flow_run)
    project.command("up")
    until(lambda: project.state(flow_run) != "Running", 90, "it is found")
    found = time.monotonic() - killed
    print(f"found by `reprise serve` {found:.1f} s after its death, `reprise up` included")
    assert found < SILENCE_SECONDS, "within three heartbeats"
    project.wait(flow_run, "Completed", seconds=200)
    document = project.document(flow_run)
    assert (document["status"], document["resumed"]) == ("succeeded", 1)
    assert [a["cause"] for a in document["attempts"]] == ["complete"], "it went on, and its end is told"
    assert len(project.versions()) == versions + 1


def test_prefects_own_automation_finds_it(project: Project) -> None:
    """Nothing of Reprise runs: the automation that `reprise deploy` has installed fires inside Prefect's server."""
    versions = len(project.versions())
    flow_run = project.start(rev="origin/main", train={"epochs": 60, "seed": 78})
    until(lambda: project.trained_steps(flow_run) > 60, 90, "it trains")
    killed = kill(project, flow_run)
    until(lambda: project.state(flow_run) != "Running", SILENCE_SECONDS + 20, "the automation fires")
    found = time.monotonic() - killed
    state = (project.prefect.run(flow_run) or {})["state"]
    print(f"found by Prefect {found:.1f} s after its death; a heartbeat every {HEARTBEAT_SECONDS} s")
    assert (state["name"], state["message"]) == ("Crashed", f"{SILENCE} {SILENCE_SECONDS} s: its process is gone.")
    project.command("up")
    project.wait(flow_run, "Completed", seconds=200)
    document = project.document(flow_run)
    assert (document["status"], document["resumed"]) == ("succeeded", 1)
    assert [a["cause"] for a in document["attempts"]] == ["complete"], "it went on, and its end is told"
    assert len(project.versions()) == versions + 1
