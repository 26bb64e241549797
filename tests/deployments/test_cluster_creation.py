"""Made, adopted or made again: one object a workload, whatever is there already or goes away by itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster import Cluster
from deployments.errors import GiveUp
from deployments.workload import Workload
from tests.cluster_kit import Background
from tests.deployments.kube_fake import KubeFake
from tests.deployments.kube_store import JOBS, PODS, Json
from tests.deployments.runner_kit import NAME, PLACE, POD, created, step, succeed


def test_a_step_is_created_followed_and_its_result_read(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        kube.logs[POD] = [f"2026-01-01T00:00:00.{n}Z line {n}" for n in range(3)]
        succeed(kube, job, document={"ok": True, "result": {"n": 2}}, state=cluster.state)

    kube.on_create[JOBS] = controllers
    lines: list[str] = []
    outcome = cluster.run(step(), on_line=lines.append)
    assert (outcome.cause, outcome.exit_code, outcome.adopted, outcome.node) == ("complete", 0, False, "n1")
    assert outcome.result == {"ok": True, "result": {"n": 2}}
    assert lines == ["line 0", "line 1", "line 2"]
    assert Path(outcome.log).read_text().splitlines() == lines
    assert kube.count("POST", "jobs") == 1


def test_success_criteria_met_is_not_yet_an_end_and_no_failure(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        pod = kube.pod_for(job)["metadata"]["name"]
        kube.condition(JOBS, NAME, "SuccessCriteriaMet")
        time.sleep(0.5)
        kube.end_pod(pod, 0, message='{"ok": true}')
        kube.condition(JOBS, NAME, "Complete")

    kube.on_create[JOBS] = controllers
    began = time.monotonic()
    outcome = cluster.run(step())
    assert outcome.cause == "complete" and time.monotonic() - began >= 0.5
    assert outcome.result == {"ok": True}  # the termination message, where there is no file


def test_the_same_name_is_adopted_and_another_key_is_refused(kube: KubeFake, cluster: Cluster) -> None:
    kube.on_create[JOBS] = lambda job: succeed(kube, job, document={"ok": True})
    assert not cluster.run(step()).adopted
    again = cluster.run(step())
    assert again.adopted and again.result == {"ok": True}
    other = step()
    other = Workload(name=NAME, image="step", command=other.command, labels={**other.labels, "key": "ffff"})
    with pytest.raises(GiveUp, match=r"reprise.dev/key=0123456789ab, expected ffff"):
        cluster.run(other)


def test_a_running_one_is_adopted_by_a_second_process(kube: KubeFake, cluster: Cluster, tmp_path: Path) -> None:
    first = Background(cluster, step())
    job = created(kube)
    second_place = Cluster(PLACE, kubeconfig=kube.kubeconfig(tmp_path), state=cluster.state)
    second = Background(second_place, step())
    kube.wait(lambda: kube.count("POST", "jobs") == 2)
    succeed(kube, job, document={"ok": True})
    assert (first.end().adopted, second.end().adopted) == (False, True)
    second_place.close()


def test_a_failed_step_is_started_anew_without_its_old_result(kube: KubeFake, cluster: Cluster) -> None:
    runs: list[Json] = []

    def controllers(job: Json) -> None:
        runs.append(job)
        if len(runs) > 1:
            return succeed(kube, job, document={"ok": True})
        assert cluster.state is not None
        (cluster.state / "jobs" / NAME / "result.json").write_text('{"ok": false, "error": {}}')
        kube.end_pod(kube.pod_for(job)["metadata"]["name"], 1, message="ValueError: no")
        kube.condition(JOBS, NAME, "Failed", "BackoffLimitExceeded")
        return None

    kube.on_create[JOBS] = controllers
    first = cluster.run(step())
    assert (first.cause, first.exit_code, first.result) == ("user_error", 1, {"ok": False, "error": {}})
    assert "ValueError: no" in first.reason
    kube.remove(PODS, POD)
    second = cluster.run(step())
    assert (second.cause, second.adopted, second.result) == ("complete", False, {"ok": True})
    assert runs[0]["metadata"]["uid"] != runs[1]["metadata"]["uid"]


def test_our_own_creation_without_an_answer_is_not_adopted(kube: KubeFake, cluster: Cluster) -> None:
    """The server made it and the connection broke: the second POST gets 409, and it is ours."""
    original = kube._create

    def create(http: Any, collection: str, body: Json) -> Json | None:
        kube._create = original  # type: ignore[method-assign]
        made = kube.put(collection, body)
        http.close_connection = True
        return made

    kube._create = create  # type: ignore[method-assign]
    kube.on_create[JOBS] = lambda job: succeed(kube, job, document={"ok": True})
    outcome = cluster.run(step())
    assert outcome.cause == "complete" and not outcome.adopted
    assert kube.count("POST", "jobs") == 2


def test_deleted_by_hand_is_made_again_once(kube: KubeFake, cluster: Cluster) -> None:
    run = Background(cluster, step())
    kube.wait(lambda: kube.has(JOBS, NAME))
    time.sleep(0.2)
    kube.remove(JOBS, NAME)
    succeed(kube, created(kube), document={"ok": True})
    outcome = run.end()
    assert outcome.cause == "complete" and kube.count("POST", "jobs") == 2
    assert any("deleted by somebody's hand" in line for line in run.lines)


def test_deleted_by_hand_waits_for_the_old_pod_before_a_new_one(kube: KubeFake, cluster: Cluster) -> None:
    run = Background(cluster, step())
    pod = kube.pod_for(created(kube))["metadata"]["name"]
    time.sleep(0.2)
    kube.remove(JOBS, NAME)
    time.sleep(0.5)
    assert not kube.has(JOBS, NAME)  # the old pod still runs
    kube.remove(PODS, pod)
    kube.wait(lambda: kube.has(JOBS, NAME))
    kube.remove(JOBS, NAME)
    assert run.end().cause == "cancelled"  # the second time it is taken for a wish


def test_pods_whose_job_is_gone_are_waited_for_by_a_new_process(kube: KubeFake, cluster: Cluster) -> None:
    """Deleted in the background while nobody watched: its pod still ends, and two must never run at once."""
    old = {"metadata": {"name": NAME, "uid": "old", "labels": {}}}
    old["metadata"]["labels"] = {"app.kubernetes.io/managed-by": "reprise", "reprise.dev/workload": NAME}
    pod = kube.pod_for(old)["metadata"]["name"]
    run = Background(cluster, step())
    kube.wait(lambda: run.lines)
    time.sleep(0.3)
    assert not kube.has(JOBS, NAME) and "is still ending" in run.lines[0]
    kube.remove(PODS, pod)
    succeed(kube, created(kube), document={"ok": True})
    assert run.end().cause == "complete"


def test_a_manifest_that_is_refused(kube: KubeFake, cluster: Cluster) -> None:
    kube.fail("POST", "/jobs", 422, message="spec.template: Invalid value")
    with pytest.raises(GiveUp, match="Invalid value"):
        cluster.run(step())
