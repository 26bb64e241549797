from __future__ import annotations

from typing import Any

import pytest

from deployments.cluster_outcome import judge
from deployments.pod_causes import PodEnd, first_cause, stamp
from deployments.workload import Workload

Json = dict[str, Any]
SPOT = {"metadata": {"labels": {"karpenter.sh/capacity-type": "spot"}}, "spec": {}}
PLAIN = {"metadata": {"labels": {"karpenter.sh/capacity-type": "on-demand"}}, "spec": {}}
TAINTED = {**SPOT, "spec": {"taints": [{"key": "karpenter.sh/disrupted"}]}}
NODES: dict[str, Json] = {
    "spot": SPOT,
    "plain": PLAIN,
    "tainted": TAINTED,
    "gone": {**SPOT, "gone": True},
    "gone-told": {**TAINTED, "gone": True},
}


def at(second: int) -> str:
    return f"2026-01-01T00:00:{second:02}Z"


def pod(
    name: str = "t-worker-0",
    *,
    node: str = "spot",
    code: int | None = None,
    second: int = 10,
    disrupted: str = "",
    told: int = 5,
    deleted: int | None = None,
    phase: str = "",
    **more: Any,
) -> Json:
    metadata: Json = {"name": name}
    if deleted is not None:  # asked for then, with 10 s of grace
        metadata |= {"deletionTimestamp": at(deleted + 10), "deletionGracePeriodSeconds": 10}
    status: Json = {"phase": phase or ("Running" if code is None else "Failed" if code else "Succeeded")}
    if code is not None:
        state = {"terminated": {"exitCode": code, "finishedAt": at(second), **more}}
        status["containerStatuses"] = [{"name": "pytorch", "state": state}]
    else:
        status |= more
    if disrupted:
        condition = {"type": "DisruptionTarget", "status": "True", "reason": disrupted, "lastTransitionTime": at(told)}
        status["conditions"] = [condition]
    return {"metadata": metadata, "spec": {"nodeName": node}, "status": status}


def cause(*pods: Json, gone: tuple[str, ...] = (), events: list[Json] | None = None) -> PodEnd | None:
    pairs = [(p, p["metadata"]["name"] in gone) for p in pods]
    return first_cause(pairs, container="pytorch", nodes=NODES, events=events or [], now=0.0)


EVICTED = "EvictionByEvictionAPI"


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (pod(code=143, disrupted=EVICTED), "spot"),
        (pod(code=143, disrupted=EVICTED, node="tainted"), "spot"),
        (pod(code=137, disrupted=EVICTED), "spot"),
        (pod(code=143, disrupted=EVICTED, node="plain"), "consolidation"),
        (pod(code=143, disrupted=EVICTED, node="gone-told"), "spot"),
        (pod(code=143, disrupted="PreemptionByScheduler"), "consolidation"),
        (pod(disrupted="DeletionByPodGC", node="gone", phase="Failed"), "node_lost"),
        (pod(disrupted="DeletionByPodGC", node="gone-told", phase="Failed"), "spot"),
        (pod(disrupted="DeletionByTaintManager", deleted=3), "node_lost"),
        (pod(disrupted="DeletionByTaintManager", deleted=3, node="tainted"), "spot"),
        (pod(disrupted="TerminationByKubelet", phase="Failed", message="imminent node shutdown"), "spot"),
        (
            pod(disrupted="TerminationByKubelet", phase="Failed", message="imminent node shutdown", node="plain"),
            "node_lost",
        ),
        (
            pod(disrupted="TerminationByKubelet", phase="Failed", reason="Evicted", message="low on resource: memory"),
            "out_of_memory",
        ),
        (pod(disrupted="TerminationByKubelet", phase="Failed", message="low on resource: pids"), "node_lost"),
        (pod(code=137, reason="OOMKilled"), "out_of_memory"),
        (pod(code=137, reason="OOMKilled", disrupted=EVICTED), "out_of_memory"),
        (pod(code=1), "user_error"),
        (pod(code=1, disrupted=EVICTED), "user_error"),  # who takes a notice well exits 143
        (pod(code=143), "node_lost"),
        (pod(code=143, deleted=5), "node_lost"),
        (pod(phase="Failed"), "node_lost"),
        (pod(code=143, node="unknown", disrupted=EVICTED), "consolidation"),
    ],
)
def test_one_pod(item: Json, expected: str) -> None:
    found = cause(item)
    assert found is not None and found.cause == expected, found
    assert found.reason and "\n" not in found.reason


def test_a_pod_that_is_well_or_done_is_no_cause() -> None:
    assert cause(pod()) is None
    assert cause(pod(code=0)) is None


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"reason": "SpotInterrupted", "message": "Spot interruption warning was triggered"}, "spot"),
        ({"reason": "DisruptionTerminating", "message": "Disrupting Node: Underutilized/Replace"}, "consolidation"),
        ({"reason": "Evicted", "message": "Evicted pod: Drifted"}, "consolidation"),
        ({"reason": "Scheduled", "message": "assigned"}, "spot"),
    ],
)
def test_events_tell_an_interruption_from_a_consolidation(event: Json, expected: str) -> None:
    found = cause(pod(code=143, disrupted=EVICTED, node="tainted"), events=[event])
    assert found is not None and found.cause == expected


def test_the_first_end_is_the_cause_and_peers_do_not_change_it() -> None:
    taken = pod("t-worker-1", code=143, second=20, disrupted=EVICTED, told=5)
    peers = [pod("t-worker-0", code=143, second=8, deleted=6), pod("t-master-0", code=1, second=9, node="plain")]
    found = cause(*peers, taken)
    assert found is not None and (found.cause, found.pod) == ("spot", "t-worker-1")


def test_a_bug_before_a_disruption_is_the_cause() -> None:
    bug = pod("t-worker-0", code=1, second=3)
    found = cause(pod("t-worker-1", code=143, disrupted=EVICTED, told=8), bug)
    assert found is not None and (found.cause, found.pod) == ("user_error", "t-worker-0")


def test_a_lost_node_is_found_behind_a_peer_that_left_first() -> None:
    lost = pod("t-worker-0", disrupted="DeletionByPodGC", node="gone", phase="Failed", told=50)
    found = cause(pod("t-master-0", code=143, second=12, node="plain"), lost, gone=("t-worker-0",))
    assert found is not None and (found.cause, found.node, found.notice) == ("node_lost", "gone", None)


def test_the_notice_is_when_the_end_was_announced() -> None:
    evicted = cause(pod(code=143, disrupted=EVICTED, told=5, deleted=6, second=12))
    assert evicted is not None and evicted.notice == stamp(at(5))
    deleted = cause(pod(code=143, deleted=7, second=12))
    assert deleted is not None and deleted.notice == stamp(at(7))
    bug = cause(pod(code=1))
    assert bug is not None and bug.notice is None


def test_an_exit_code_that_the_server_made_up_is_none() -> None:
    found = cause(pod(code=137, reason="ContainerStatusUnknown", disrupted="DeletionByPodGC", node="gone"))
    assert found is not None and (found.cause, found.exit_code) == ("node_lost", None)


def work(**more: Any) -> Workload:
    return Workload(name="t", image="train", command=("x",), **{"spot": True, **more})


def item(*conditions: tuple[str, str, str]) -> Json:
    listed = [{"type": t, "status": "True", "reason": r, "message": m} for t, r, m in conditions]
    return {"metadata": {"creationTimestamp": at(0)}, "status": {"conditions": listed}}


FAILED = item(("Failed", "PyTorchJobFailed", "1 replica failed"))


def test_outcome_of_success_whatever_the_workers_exit() -> None:
    pods = [(pod("t-master-0", code=0), False), (pod("t-worker-0", code=143, deleted=11), False)]
    verdict = judge(work(replicas=2), item(("Succeeded", "", "")), pods, container="pytorch", nodes=NODES)
    assert (verdict.cause, verdict.exit_code, verdict.capacity) == ("complete", 0, "spot")


def test_outcome_of_what_the_place_ended() -> None:
    pods = [(pod(code=143, deleted=5), True)]
    verdict = judge(work(), FAILED, pods, container="pytorch", nodes=NODES, ending=("deadline", "too long"))
    assert (verdict.cause, verdict.reason, verdict.exit_code) == ("deadline", "too long", 143)


def test_outcome_when_a_pod_went_unseen() -> None:
    master = (pod("t-master-0", code=143, node="plain"), False)
    verdict = judge(work(replicas=2), FAILED, [master], container="pytorch", nodes=NODES)
    assert verdict.cause == "node_lost" and "while nobody watched" in verdict.reason
    verdict = judge(work(), FAILED, [], container="pytorch", nodes={})
    assert (verdict.cause, verdict.capacity, verdict.node) == ("spot", "spot", "")
    bug = (pod("t-master-0", code=1), False)
    assert judge(work(replicas=2), FAILED, [bug], container="pytorch", nodes=NODES).cause == "user_error"
