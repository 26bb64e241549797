"""A workload's log while it runs and afterwards, and a listener that fails."""

from __future__ import annotations

import time

import pytest

from deployments.cluster import Cluster
from deployments.errors import GiveUp
from tests.cluster_kit import Background
from tests.deployments.kube_fake import KubeFake
from tests.deployments.kube_store import JOBS, PODS, Json
from tests.deployments.runner_kit import NAME, POD, created, step


def test_a_log_that_ended_in_order_is_asked_for_once_more_at_the_end(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        kube.logs[POD] = ["2026-01-01T00:00:00.1Z a"]
        pod = kube.pod_for(job)["metadata"]["name"]
        kube.wait(lambda: kube.count("GET", "/log") == 1)
        time.sleep(1.5)
        kube.logs[pod].append("2026-01-01T00:00:00.2Z late")
        kube.end_pod(pod, 0)
        kube.condition(JOBS, NAME, "Complete")

    kube.on_create[JOBS] = controllers
    lines: list[str] = []
    assert cluster.run(step(), on_line=lines.append).cause == "complete"
    assert lines == ["a", "late"] and kube.count("GET", "/log") == 2


def test_a_log_that_is_cut_resumes_without_losing_or_repeating_a_line(kube: KubeFake, cluster: Cluster) -> None:
    run = Background(cluster, step())
    job = created(kube)
    kube.open_logs.add(POD)
    kube.logs[POD] = ["2026-01-01T00:00:00.1Z a", "2026-01-01T00:00:00.2Z b", "2026-01-01T00:00:00.2Z b"]
    kube.pod_for(job)
    kube.wait(lambda: len(run.lines) == 3)
    kube.cut()
    with kube.changed:
        kube.logs[POD] += ["2026-01-01T00:00:00.2Z c", "2026-01-01T00:00:00.25Z d"]
        kube.changed.notify_all()
    kube.wait(lambda: len(run.lines) == 5)
    kube.open_logs.clear()
    kube.end_pod(POD, 0, message='{"ok": true}')
    kube.condition(JOBS, NAME, "Complete")
    run.end()
    assert run.lines == ["a", "b", "b", "c", "d"]
    assert list(cluster.logs(NAME)) == run.lines
    kube.remove(PODS, POD)
    assert list(cluster.logs(NAME)) == run.lines  # from the state volume
    with pytest.raises(GiveUp, match="has no log"):
        list(cluster.logs("nobody"))


def test_an_error_of_the_listener_leaves_the_workload_running(kube: KubeFake, cluster: Cluster) -> None:
    kube.on_create[JOBS] = lambda job: kube.pod_for(job)
    kube.logs[POD] = ["2026-01-01T00:00:00Z a"]

    def refuse(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cluster.run(step(), on_line=refuse)
    assert kube.has(JOBS, NAME)
