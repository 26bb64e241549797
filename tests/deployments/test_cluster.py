from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster import Cluster
from deployments.errors import GiveUp, PreflightError, Unreachable
from deployments.kube_api import connect
from deployments.manifests import ClusterPlace
from deployments.workload import Outcome, Runner, Workload
from tests.deployments.kube_fake import KubeFake
from tests.deployments.kube_store import JOBS, NODES, PODS, TRAININGS, timestamp

Json = dict[str, Any]
PLACE = ClusterPlace(namespace="ns", images={"step": "reprise-step", "train": "reprise-train"})
NAME = "pull-data-0123456789ab"


@pytest.fixture
def kube(tmp_path: Path) -> Iterator[KubeFake]:
    with KubeFake() as fake:
        spot, plain = {"karpenter.sh/capacity-type": "spot"}, {"karpenter.sh/capacity-type": "on-demand"}
        fake.put(NODES, {"metadata": {"name": "n1", "labels": spot}, "spec": {}})
        fake.put(NODES, {"metadata": {"name": "n2", "labels": spot}, "spec": {}})
        fake.put(NODES, {"metadata": {"name": "cpu", "labels": plain}, "spec": {}})
        yield fake


@pytest.fixture
def cluster(kube: KubeFake, tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "state").mkdir()
    api = connect(kubeconfig=kube.kubeconfig(tmp_path), patience=6.0)
    place = Cluster(PLACE, api=api, state=tmp_path / "state", start_patience=0.3, lost_node_seconds=0.5)
    runner: Runner = place
    assert runner.place == "cluster"
    yield place
    place.close()
    api.close()


def step(name: str = NAME, **more: Any) -> Workload:
    labels = {"run": "r1", "pipeline": "digits", "step": "pull_data", "key": "0123456789ab"}
    command = ("python", "-m", "tasks.step", "pull_data", "{request}", "{result}")
    return Workload(name=name, image="step", command=command, request={"n": 1}, labels=labels, **more)


def training(name: str = "train-0123456789ab-1", **more: Any) -> Workload:
    more = {"spot": True, "grace_seconds": 5.0, **more}
    command = ("python", "-m", "training.launch", "--spec", "{request}")
    return Workload(name=name, image="train", command=command, labels={"key": "0123456789ab"}, **more)


class Background:
    """A run in a thread of its own."""

    def __init__(self, cluster: Cluster, workload: Workload) -> None:
        self.lines: list[str] = []
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None

        def run() -> None:
            try:
                self.outcome = cluster.run(workload, on_line=self.lines.append)
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def end(self, seconds: float = 12.0) -> Outcome:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), f"it still waits; lines: {self.lines}"
        if self.error is not None:
            raise self.error
        assert self.outcome is not None
        return self.outcome


def succeed(kube: KubeFake, item: Json, *, document: Json | None = None, state: Path | None = None) -> None:
    """Play the controllers for a step that runs well."""
    pod = kube.pod_for(item)["metadata"]["name"]
    if state is not None:
        folder = state / "jobs" / item["metadata"]["name"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(document))
        kube.end_pod(pod, 0)
    else:
        kube.end_pod(pod, 0, message=json.dumps(document) if document else "")
    kube.condition(JOBS, item["metadata"]["name"], "SuccessCriteriaMet")
    time.sleep(0.1)
    kube.condition(JOBS, item["metadata"]["name"], "Complete")


def test_a_step_is_created_followed_and_its_result_read(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        kube.logs[f"{NAME}-abcde"] = [f"2026-01-01T00:00:00.{n}Z line {n}" for n in range(3)]
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
    job = kube.wait(lambda: kube.has(JOBS, NAME) and kube.get(JOBS, NAME))
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
    kube.remove(PODS, f"{NAME}-abcde")
    second = cluster.run(step())
    assert (second.cause, second.adopted, second.result) == ("complete", False, {"ok": True})
    assert runs[0]["metadata"]["uid"] != runs[1]["metadata"]["uid"]


@pytest.mark.parametrize(("status", "headers"), [(429, {"Retry_After": "0.1"}), (500, {}), (503, {}), (0, {})])
def test_an_api_server_in_trouble_is_asked_again(
    kube: KubeFake, cluster: Cluster, status: int, headers: dict[str, str]
) -> None:
    kube.fail("POST", "/jobs", status, times=2, **headers)
    kube.fail("GET", "/jobs", status, times=2, **headers)
    kube.on_create[JOBS] = lambda job: succeed(kube, job, document={"ok": True})
    outcome = cluster.run(step())
    assert outcome.cause == "complete" and not outcome.adopted


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


def test_an_api_server_that_is_away_for_three_seconds(kube: KubeFake, cluster: Cluster) -> None:
    run = Background(cluster, step())
    job = kube.wait(lambda: kube.has(JOBS, NAME) and kube.get(JOBS, NAME))
    time.sleep(0.2)
    kube.stop()
    succeed(kube, job, document={"ok": True})  # it went on meanwhile
    time.sleep(3)
    kube.start()
    assert run.end().cause == "complete"


def test_an_api_server_that_stays_away_says_so_and_the_workload_runs_on(kube: KubeFake, tmp_path: Path) -> None:
    place = Cluster(PLACE, kubeconfig=kube.kubeconfig(tmp_path), patience=0.5)
    run = Background(place, step())
    kube.wait(lambda: kube.has(JOBS, NAME))
    time.sleep(0.2)
    kube.stop()
    with pytest.raises(Unreachable, match="has not answered for"):
        run.end()
    assert kube.has(JOBS, NAME)
    place.close()


def test_watches_that_are_cut_repeat_or_are_too_old(kube: KubeFake, cluster: Cluster) -> None:
    kube.duplicates, kube.cut_after = True, 1
    run = Background(cluster, step())
    job = kube.wait(lambda: kube.has(JOBS, NAME) and kube.get(JOBS, NAME))
    pod = kube.pod_for(job)["metadata"]["name"]
    time.sleep(0.3)
    kube.oldest = kube.version + 3
    kube.cut()  # the next watch gets 410 and lists again
    kube.end_pod(pod, 0, message='{"ok": true}')
    kube.condition(JOBS, NAME, "Complete")
    kube.put(JOBS, {"metadata": {"name": "x"}})
    assert run.end().result == {"ok": True}


def test_a_suspended_job_is_waited_for(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        kube.condition(JOBS, NAME, "Suspended")
        time.sleep(0.5)
        kube.change(JOBS, NAME, conditions=[])
        succeed(kube, job, document={"ok": True})

    kube.on_create[JOBS] = controllers
    assert cluster.run(step()).cause == "complete"


def test_deleted_by_hand_is_made_again_once(kube: KubeFake, cluster: Cluster) -> None:
    run = Background(cluster, step())
    kube.wait(lambda: kube.has(JOBS, NAME))
    time.sleep(0.2)
    kube.remove(JOBS, NAME)
    job = kube.wait(lambda: kube.has(JOBS, NAME) and kube.get(JOBS, NAME))
    succeed(kube, job, document={"ok": True})
    outcome = run.end()
    assert outcome.cause == "complete" and kube.count("POST", "jobs") == 2
    assert any("deleted by somebody's hand" in line for line in run.lines)


def test_deleted_by_hand_waits_for_the_old_pod_before_a_new_one(kube: KubeFake, cluster: Cluster) -> None:
    run = Background(cluster, step())
    job = kube.wait(lambda: kube.has(JOBS, NAME) and kube.get(JOBS, NAME))
    pod = kube.pod_for(job)["metadata"]["name"]
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
    succeed(kube, kube.wait(lambda: kube.has(JOBS, NAME) and kube.get(JOBS, NAME)), document={"ok": True})
    assert run.end().cause == "complete"


def test_stop_ends_it_as_cancelled_and_is_idempotent(kube: KubeFake, cluster: Cluster) -> None:
    kube.foreground = {JOBS, PODS}
    run = Background(cluster, step())
    job = kube.wait(lambda: kube.has(JOBS, NAME) and kube.get(JOBS, NAME))
    pod = kube.pod_for(job)["metadata"]["name"]
    stopping = threading.Thread(target=cluster.stop, args=(NAME,), kwargs={"grace_seconds": 2})
    stopping.start()
    kube.wait(lambda: kube.get(PODS, pod)["metadata"].get("deletionGracePeriodSeconds") == 2)
    kube.end_pod(pod, 143)
    kube.remove(PODS, pod)
    kube.remove(JOBS, NAME)
    outcome = run.end()
    stopping.join(5)
    assert (outcome.cause, outcome.exit_code, outcome.reason) == ("cancelled", 143, "somebody stopped it")
    cluster.stop(NAME)


def test_a_pod_that_its_watch_tells_of_after_its_jobs_end_still_tells_the_exit_code(
    kube: KubeFake, cluster: Cluster
) -> None:
    """The watches of Jobs and Pods are two streams: with both away, only the late events know how the pod ended."""
    kube.foreground = {JOBS, PODS}
    kube.silent = {PODS}
    run = Background(cluster, step())
    job = kube.wait(lambda: kube.has(JOBS, NAME) and kube.get(JOBS, NAME))
    pod = kube.pod_for(job)["metadata"]["name"]
    stopping = threading.Thread(target=cluster.stop, args=(NAME,), kwargs={"grace_seconds": 2})
    stopping.start()
    kube.wait(lambda: kube.get(PODS, pod)["metadata"].get("deletionGracePeriodSeconds") == 2)
    kube.end_pod(pod, 143)
    kube.remove(PODS, pod)
    kube.remove(JOBS, NAME)
    time.sleep(0.5)
    kube.silent = set()
    assert (run.end().cause, run.end().exit_code) == ("cancelled", 143)
    stopping.join(5)


def test_deadline(kube: KubeFake, cluster: Cluster) -> None:
    kube.on_create[JOBS] = lambda job: kube.pod_for(job)
    run = Background(cluster, step(deadline_seconds=0.3))
    kube.wait(lambda: kube.count("DELETE", "jobs") == 1)
    kube.end_pod(f"{NAME}-abcde", 143)
    outcome = run.end()
    assert (outcome.cause, outcome.exit_code) == ("deadline", 143)


def test_the_job_controllers_own_deadline(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        kube.end_pod(kube.pod_for(job)["metadata"]["name"], 143)
        kube.condition(JOBS, NAME, "Failed", "DeadlineExceeded")

    kube.on_create[JOBS] = controllers
    assert cluster.run(step(deadline_seconds=60)).cause == "deadline"


def test_no_capacity_names_what_is_missing(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        text = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}
        kube.pod_for(job, node="", phase="Pending", conditions=[condition])

    kube.on_create[JOBS] = controllers
    run = Background(cluster, step(start_seconds=0.5))
    kube.wait(lambda: kube.count("DELETE", "jobs") == 1)
    kube.remove(PODS, f"{NAME}-abcde")
    outcome = run.end()
    assert outcome.cause == "no_capacity" and outcome.exit_code is None
    assert "Insufficient nvidia.com/gpu" in outcome.reason and not kube.has(JOBS, NAME)


def test_a_place_in_a_queue_is_no_want_of_a_node(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        kube.condition(JOBS, NAME, "Suspended")
        time.sleep(0.8)
        kube.change(JOBS, NAME, conditions=[])
        freed.append(time.time())

    freed: list[float] = []
    kube.on_create[JOBS] = controllers
    outcome = Background(cluster, step(start_seconds=0.4)).end()
    assert outcome.cause == "no_capacity" and freed, "not while it was suspended"
    assert outcome.ended - freed[0] > 0.35


def test_an_image_that_cannot_be_pulled_is_a_preflight_error(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        waiting = {"reason": "ErrImagePull", "message": "manifest unknown"}
        status = [{"name": "step", "image": "reg/x:1", "state": {"waiting": waiting}}]
        kube.pod_for(job, phase="Pending", containerStatuses=status)

    kube.on_create[JOBS] = controllers
    run = Background(cluster, step())
    kube.wait(lambda: kube.count("DELETE", "jobs") == 1)
    kube.remove(PODS, f"{NAME}-abcde")
    with pytest.raises(PreflightError, match="reg/x:1 cannot be pulled"):
        run.end()


def test_a_claim_that_is_not_there_is_a_preflight_error(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        text = '0/3 nodes are available: persistentvolumeclaim "reprise" not found. preemption: not helpful.'
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}
        kube.pod_for(job, node="", phase="Pending", conditions=[condition])

    kube.on_create[JOBS] = controllers
    run = Background(cluster, step())
    kube.wait(lambda: kube.count("DELETE", "jobs") == 1)
    kube.remove(PODS, f"{NAME}-abcde")
    with pytest.raises(PreflightError, match="create the claim reprise"):
        run.end()


def test_a_missing_right_prints_the_rule(kube: KubeFake, cluster: Cluster) -> None:
    said = 'jobs.batch is forbidden: User "u" cannot create resource "jobs" in API group "batch" in the namespace "ns"'
    kube.fail("POST", "/jobs", 403, message=said)
    rule = r'Role: \{"apiGroups": \["batch"\], "resources": \["jobs"\], "verbs": \["create"\]\}'
    with pytest.raises(PreflightError, match=rule):
        cluster.run(step())


def test_a_watch_that_is_forbidden_ends_the_run(kube: KubeFake, cluster: Cluster) -> None:
    said = 'pods is forbidden: User "u" cannot watch resource "pods" in API group "" in the namespace "ns"'
    kube.fail("GET", "/pods.*watch=1", 403, message=said, times=5)
    with pytest.raises(PreflightError, match=r'"resources": \["pods"\], "verbs": \["watch"\]'):
        cluster.run(step())


def test_credentials_that_are_refused(kube: KubeFake, cluster: Cluster) -> None:
    kube.fail("GET", "/jobs", 401, message="Unauthorized", times=5)
    with pytest.raises(PreflightError, match="refused our credentials"):
        cluster.run(step())


def test_a_cluster_without_the_operator(kube: KubeFake, cluster: Cluster) -> None:
    kube.missing.add(TRAININGS)
    with pytest.raises(PreflightError, match=r"no PyTorchJob.*install") as refused:
        cluster.run(training())
    pinned = Path(__file__).parents[2] / "deployments/k8s/components/training-operator/operator/kustomization.yaml"
    (version,) = re.findall(r"\?ref=(v[0-9.]+)", str(refused.value))
    assert f"training-operator/manifests/overlays/standalone?ref={version}\n" in pinned.read_text()
    cluster.stop("train-0123456789ab-1")  # and stopping what cannot be there is no error


def test_a_manifest_that_is_refused(kube: KubeFake, cluster: Cluster) -> None:
    kube.fail("POST", "/jobs", 422, message="spec.template: Invalid value")
    with pytest.raises(GiveUp, match="Invalid value"):
        cluster.run(step())


# --- attempts of a training


def attempt(kube: KubeFake, item: Json, *, workers: int = 0) -> None:
    name = item["metadata"]["name"]
    kube.pod_for(item, f"{name}-master-0", node="n1" if not workers else "cpu", container="pytorch")
    for index in range(workers):
        kube.pod_for(item, f"{name}-worker-{index}", node=f"n{index + 1}", container="pytorch")


def disrupt(kube: KubeFake, pod: str, reason: str) -> None:
    kube.condition(PODS, pod, "DisruptionTarget", reason)
    item = kube.get(PODS, pod)
    item["metadata"] |= {"deletionTimestamp": timestamp(-5), "deletionGracePeriodSeconds": 5}
    kube.put(PODS, item)


def test_an_evicted_attempt_is_spot_and_tells_notice_and_node(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(item: Json) -> None:
        name = item["metadata"]["name"]
        attempt(kube, item)
        node = kube.get(NODES, "n1")
        node["spec"] = {"taints": [{"key": "karpenter.sh/disrupted", "effect": "NoSchedule"}]}
        kube.put(NODES, node)
        disrupt(kube, f"{name}-master-0", "EvictionByEvictionAPI")
        kube.condition(TRAININGS, name, "Failed", "PyTorchJobFailed")
        time.sleep(0.3)
        kube.end_pod(f"{name}-master-0", 143, container="pytorch")

    kube.on_create[TRAININGS] = controllers
    outcome = cluster.run(training())
    assert (outcome.cause, outcome.exit_code, outcome.node, outcome.capacity) == ("spot", 143, "n1", "spot")
    assert outcome.notice is not None and abs(outcome.notice - time.time()) < 5
    again = cluster.run(training())
    assert (again.cause, again.adopted) == ("spot", True)  # its end is told again, nothing is started
    assert kube.count("POST", "pytorchjobs") == 2


def test_the_rest_of_an_attempt_is_told_to_leave_and_waited_for(kube: KubeFake, cluster: Cluster) -> None:
    kube.foreground = {PODS}
    kube.on_create[TRAININGS] = lambda item: attempt(kube, item, workers=2)
    run = Background(cluster, training(replicas=3))
    name = "train-0123456789ab-1"
    kube.wait(lambda: kube.has(PODS, f"{name}-worker-1"))
    disrupt(kube, f"{name}-worker-1", "EvictionByEvictionAPI")
    kube.condition(TRAININGS, name, "Failed", "PyTorchJobFailed")
    kube.wait(lambda: "deletionTimestamp" in kube.get(PODS, f"{name}-master-0")["metadata"])
    kube.wait(lambda: "deletionTimestamp" in kube.get(PODS, f"{name}-worker-0")["metadata"])
    kube.end_pod(f"{name}-worker-1", 143, container="pytorch")
    kube.end_pod(f"{name}-worker-0", 143, container="pytorch")
    time.sleep(0.3)
    assert run.outcome is None  # the master still saves
    kube.end_pod(f"{name}-master-0", 143, container="pytorch")
    kube.remove(PODS, f"{name}-master-0")
    outcome = run.end()
    assert (outcome.cause, outcome.node, outcome.capacity) == ("spot", "n2", "spot")


def test_a_node_that_vanished_is_node_lost_without_a_notice(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(item: Json) -> None:
        name = item["metadata"]["name"]
        attempt(kube, item, workers=1)
        kube.end_pod(f"{name}-master-0", 143, container="pytorch")  # its peer is gone
        kube.condition(TRAININGS, name, "Failed", "PyTorchJobFailed")
        time.sleep(0.2)
        kube.remove(NODES, "n1")
        disrupt(kube, f"{name}-worker-0", "DeletionByPodGC")
        kube.change(PODS, f"{name}-worker-0", phase="Failed")
        kube.remove(PODS, f"{name}-worker-0")

    kube.on_create[TRAININGS] = controllers
    kube.foreground = {PODS}
    outcome = cluster.run(training(replicas=2))
    assert (outcome.cause, outcome.node, outcome.exit_code, outcome.notice) == ("node_lost", "n1", None, None)


def test_a_bug_is_a_bug_although_its_peers_leave(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(item: Json) -> None:
        name = item["metadata"]["name"]
        attempt(kube, item, workers=1)
        kube.logs[f"{name}-worker-0"] = ["2026-01-01T00:00:00Z training.launch: exit 1: worker 1: ValueError"]
        kube.end_pod(f"{name}-worker-0", 1, container="pytorch", message="ValueError")
        kube.condition(TRAININGS, name, "Failed", "PyTorchJobFailed")
        time.sleep(0.2)
        kube.end_pod(f"{name}-master-0", 143, container="pytorch")

    kube.on_create[TRAININGS] = controllers
    kube.foreground = {PODS}
    outcome = cluster.run(training(replicas=2))
    assert (outcome.cause, outcome.exit_code) == ("user_error", 1)
    assert "training.launch: exit 1: worker 1: ValueError" in Path(outcome.log).read_text()


def test_out_of_memory(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(item: Json) -> None:
        attempt(kube, item)
        kube.end_pod(f"{item['metadata']['name']}-master-0", 137, container="pytorch", reason="OOMKilled")
        kube.condition(TRAININGS, item["metadata"]["name"], "Failed")

    kube.on_create[TRAININGS] = controllers
    outcome = cluster.run(training())
    assert (outcome.cause, outcome.exit_code) == ("out_of_memory", 137)
    assert "raise memory" in outcome.reason


def test_success_waits_for_the_workers_and_then_ends_them(kube: KubeFake, cluster: Cluster) -> None:
    kube.foreground = {PODS}
    kube.on_create[TRAININGS] = lambda item: attempt(kube, item, workers=1)
    run = Background(cluster, training(replicas=2, grace_seconds=0.5))
    name = "train-0123456789ab-1"
    kube.wait(lambda: kube.has(PODS, f"{name}-worker-0"))
    kube.end_pod(f"{name}-master-0", 0, container="pytorch")
    kube.condition(TRAININGS, name, "Succeeded")
    kube.wait(lambda: kube.get(PODS, f"{name}-worker-0")["metadata"].get("deletionTimestamp"), 10)
    kube.end_pod(f"{name}-worker-0", 143, container="pytorch")
    assert run.end().cause == "complete"


def test_a_pod_that_vanished_before_the_operator_saw_it_ends_the_attempt(kube: KubeFake, cluster: Cluster) -> None:
    kube.on_create[TRAININGS] = lambda item: attempt(kube, item)
    run = Background(cluster, training())
    name = "train-0123456789ab-1"
    kube.wait(lambda: kube.has(PODS, f"{name}-master-0"))
    kube.remove(PODS, f"{name}-master-0")
    outcome = run.end()
    assert outcome.cause == "node_lost" and not kube.has(TRAININGS, name)


def test_an_attempt_whose_end_nobody_saw(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(item: Json) -> None:
        kube.condition(TRAININGS, item["metadata"]["name"], "Failed", "PyTorchJobFailed", "1 Master replica(s) failed")

    kube.on_create[TRAININGS] = controllers
    outcome = cluster.run(training())
    assert outcome.cause == "spot" and "while nobody watched" in outcome.reason


def test_a_pod_on_a_dead_node_is_given_up(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(item: Json) -> None:
        name = item["metadata"]["name"]
        attempt(kube, item)
        pod = kube.get(PODS, f"{name}-master-0")
        pod["metadata"]["deletionTimestamp"] = timestamp(1)
        kube.put(PODS, pod)
        node = kube.get(NODES, "n1")
        node["spec"] = {"taints": [{"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}]}
        kube.put(NODES, node)
        kube.condition(TRAININGS, name, "Failed")

    kube.on_create[TRAININGS] = controllers
    kube.foreground = {PODS}
    assert cluster.run(training()).cause == "node_lost"


# --- logs, and what it costs


def test_a_log_that_ended_in_order_is_asked_for_once_more_at_the_end(kube: KubeFake, cluster: Cluster) -> None:
    def controllers(job: Json) -> None:
        kube.logs[f"{NAME}-abcde"] = ["2026-01-01T00:00:00.1Z a"]
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
    job = kube.wait(lambda: kube.has(JOBS, NAME) and kube.get(JOBS, NAME))
    pod = f"{NAME}-abcde"
    kube.open_logs.add(pod)
    kube.logs[pod] = ["2026-01-01T00:00:00.1Z a", "2026-01-01T00:00:00.2Z b", "2026-01-01T00:00:00.2Z b"]
    kube.pod_for(job)
    kube.wait(lambda: len(run.lines) == 3)
    kube.cut()
    with kube.changed:
        kube.logs[pod] += ["2026-01-01T00:00:00.2Z c", "2026-01-01T00:00:00.25Z d"]
        kube.changed.notify_all()
    kube.wait(lambda: len(run.lines) == 5)
    kube.open_logs.clear()
    kube.end_pod(pod, 0, message='{"ok": true}')
    kube.condition(JOBS, NAME, "Complete")
    run.end()
    assert run.lines == ["a", "b", "b", "c", "d"]
    assert list(cluster.logs(NAME)) == run.lines
    kube.remove(PODS, pod)
    assert list(cluster.logs(NAME)) == run.lines  # from the state volume
    with pytest.raises(GiveUp, match="has no log"):
        list(cluster.logs("nobody"))


def test_many_workloads_share_one_watch_a_kind(kube: KubeFake, cluster: Cluster) -> None:
    kube.on_create[JOBS] = lambda job: succeed(kube, job, document={"ok": True})
    runs = [Background(cluster, step(f"pull-data-{number}")) for number in range(20)]
    assert {run.end().cause for run in runs} == {"complete"}
    assert kube.count("GET", r"/jobs\?.*watch=1") == 1
    assert kube.count("GET", r"/pods\?.*watch=1") == 1
    assert kube.count("POST", "jobs") == 20


def test_an_error_of_the_listener_leaves_the_workload_running(kube: KubeFake, cluster: Cluster) -> None:
    kube.on_create[JOBS] = lambda job: kube.pod_for(job)
    kube.logs[f"{NAME}-abcde"] = ["2026-01-01T00:00:00Z a"]

    def refuse(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cluster.run(step(), on_line=refuse)
    assert kube.has(JOBS, NAME)
