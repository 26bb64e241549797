from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster_serving import REVISION, Rollouts
from deployments.errors import GiveUp, TryAgain
from deployments.kube_connect import connect
from tests.deployments.kube_fake import KubeFake
from tests.deployments.kube_store import PODS

Json = dict[str, Any]
DEPLOYMENTS, SETS = "/apis/apps/v1/namespaces/ns/deployments", "/apis/apps/v1/namespaces/ns/replicasets"
LABELS = {"app": "x"}


@pytest.fixture
def rollouts(kube: KubeFake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rollouts]:
    monkeypatch.setattr("deployments.cluster_serving.POLL_SECONDS", 0.05)
    api = connect(kubeconfig=kube.kubeconfig(tmp_path), patience=2.0)
    yield Rollouts(api, "ns")
    api.close()


def deployment(kube: KubeFake, *, revision: int = 2, **status: Any) -> Json:
    item = {
        "metadata": {"name": "serve-x", "generation": 3, "annotations": {REVISION: str(revision)}, "uid": "d"},
        "spec": {"replicas": 2, "selector": {"matchLabels": LABELS}, "template": {"spec": {"v": revision}}},
        "status": {"observedGeneration": 3, **status},
    }
    return kube.put(DEPLOYMENTS, item)


def replica_set(kube: KubeFake, revision: int, owner: str = "d") -> None:
    metadata = {
        "name": f"serve-x-{revision}-{owner}",
        "uid": f"r{revision}{owner}",
        "labels": LABELS,
        "annotations": {REVISION: str(revision)},
        "ownerReferences": [{"uid": owner}],
    }
    template = {"metadata": {"labels": {**LABELS, "pod-template-hash": "h"}}, "spec": {"v": revision}}
    kube.put(SETS, {"metadata": metadata, "spec": {"template": template}})


def new_pod(kube: KubeFake, revision: int, **status: Any) -> None:
    metadata = {"name": f"p{revision}", "labels": LABELS, "ownerReferences": [{"uid": f"r{revision}d"}]}
    kube.put(PODS, {"metadata": metadata, "spec": {}, "status": {"phase": "Running", **status}})


def test_a_rollout_is_complete_when_every_pod_is_new_and_available(kube: KubeFake, rollouts: Rollouts) -> None:
    deployment(kube, updatedReplicas=1, availableReplicas=2, replicas=3)
    heard: list[str] = []

    def finish() -> None:
        kube.wait(lambda: heard)
        kube.change(DEPLOYMENTS, "serve-x", updatedReplicas=2, availableReplicas=2, replicas=3)  # an old one leaves
        kube.wait(lambda: len(heard) > 1)
        kube.change(DEPLOYMENTS, "serve-x", replicas=2)

    threading.Thread(target=finish, daemon=True).start()
    found = rollouts.wait("serve-x", seconds=10, on_change=heard.append)
    assert found.complete and not found.failed and found.revision == 2
    assert heard == [
        "1 of 2 pods are new, 2 available",
        "2 of 2 pods are new, 2 available",
        "2 of 2 pods are new and available",
    ]


def test_what_the_controller_has_not_seen_is_not_complete(kube: KubeFake, rollouts: Rollouts) -> None:
    deployment(kube, observedGeneration=2, updatedReplicas=2, availableReplicas=2, replicas=2)
    found = rollouts.state("serve-x")
    assert not found.complete and "not looked at it" in found.reason


def test_a_pod_that_ends_at_each_start_fails_the_rollout_early(kube: KubeFake, rollouts: Rollouts) -> None:
    deployment(kube, updatedReplicas=1, availableReplicas=2, replicas=3)
    replica_set(kube, 1)
    replica_set(kube, 2)
    last = {"terminated": {"exitCode": 4, "message": "started\nthe model answers wrongly: s1\n"}}
    new_pod(kube, 1, containerStatuses=[{"name": "old", "restartCount": 9}])  # not one of the new ones
    assert not rollouts.state("serve-x").failed
    new_pod(kube, 2, containerStatuses=[{"name": "torchserve", "restartCount": 2, "lastState": last}])
    found = rollouts.wait("serve-x", seconds=5)
    assert found.failed and found.reason == (
        "container torchserve ends at each start (exit 4): the model answers wrongly: s1"
    )


def test_an_image_that_is_no_reference_fails_at_once(kube: KubeFake, rollouts: Rollouts) -> None:
    deployment(kube)
    replica_set(kube, 2)
    state = {"waiting": {"reason": "InvalidImageName"}}
    new_pod(kube, 2, phase="Pending", containerStatuses=[{"name": "c", "image": "a b", "state": state}])
    assert rollouts.state("serve-x").failed


def test_a_verdict_of_the_pod_fails_the_rollout_at_its_first_end(kube: KubeFake, rollouts: Rollouts) -> None:
    deployment(kube, updatedReplicas=1, availableReplicas=2, replicas=3)
    replica_set(kube, 2)
    ended = {"terminated": {"exitCode": 1, "message": "no route to host"}}
    new_pod(kube, 2, initContainerStatuses=[{"name": "fetch", "restartCount": 1, "lastState": ended}])
    assert not rollouts.state("serve-x").failed  # it may come right
    ended = {"terminated": {"exitCode": 4, "message": "x.mar has sha256 1, packaged was 2"}}
    new_pod(kube, 2, initContainerStatuses=[{"name": "fetch", "state": ended}])
    assert rollouts.state("serve-x").reason.endswith("(exit 4): x.mar has sha256 1, packaged was 2")
    healthy = {"name": "torchserve", "ready": True, "restartCount": 9, "lastState": ended}  # long ago
    new_pod(kube, 2, containerStatuses=[healthy])
    assert not rollouts.state("serve-x").failed


def test_what_somebody_has_to_put_right_is_waited_for_a_while(kube: KubeFake, rollouts: Rollouts) -> None:
    deployment(kube, updatedReplicas=1, availableReplicas=2, replicas=3)
    replica_set(kube, 2)
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "manifest unknown"}}
    new_pod(kube, 2, phase="Pending", containerStatuses=[{"name": "c", "image": "i:1", "state": waiting}])
    threading.Timer(1.2, lambda: kube.change(DEPLOYMENTS, "serve-x", updatedReplicas=2, replicas=2)).start()
    threading.Timer(0.3, lambda: new_pod(kube, 2)).start()  # pushed in time
    found = rollouts.wait("serve-x", seconds=20, patience=0.9)
    assert found.complete
    deployment(kube, updatedReplicas=1, availableReplicas=2, replicas=3)
    new_pod(kube, 2, phase="Pending", containerStatuses=[{"name": "c", "image": "i:1", "state": waiting}])
    began = time.monotonic()
    found = rollouts.wait("serve-x", seconds=20, patience=0.3)
    assert found.failed and "image i:1 cannot be pulled" in found.reason and time.monotonic() - began < 3


def test_pods_that_cannot_be_created(kube: KubeFake, rollouts: Rollouts) -> None:
    failure = {"type": "ReplicaFailure", "status": "True", "message": 'pods "x" is forbidden: exceeded quota: q'}
    deployment(kube, updatedReplicas=0, availableReplicas=2, replicas=2, conditions=[failure])
    found = rollouts.wait("serve-x", seconds=20, patience=0.2)
    assert found.failed and "exceeded quota: q; wait for room" in found.reason


def test_the_deadline_names_what_holds_the_new_pod(kube: KubeFake, rollouts: Rollouts) -> None:
    condition = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "m"}
    deployment(kube, conditions=[condition])
    replica_set(kube, 2)
    assert rollouts.state("serve-x").reason == "m"
    new_pod(kube, 2, containerStatuses=[{"name": "torchserve", "ready": False}])
    assert "does not answer its golden requests" in rollouts.state("serve-x").reason
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "not found"}}
    new_pod(kube, 2, phase="Pending", containerStatuses=[{"name": "c", "image": "i:1", "state": waiting}])
    found = rollouts.state("serve-x")
    assert found.failed and "i:1 cannot be pulled" in found.reason


def test_patience_has_an_end(kube: KubeFake, rollouts: Rollouts) -> None:
    deployment(kube, updatedReplicas=1, availableReplicas=1)
    found = rollouts.wait("serve-x", seconds=0.2)
    assert found.failed and found.reason == "not complete after 0.2 s: 1 of 2 pods are new, 1 available"


def test_no_deployment(rollouts: Rollouts) -> None:
    with pytest.raises(GiveUp, match="no Deployment serve-y in namespace ns"):
        rollouts.state("serve-y")
    rollouts.delete("serve-y", seconds=1)


ITEM: Json = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "serve-x"},
    "spec": {"replicas": 2, "minReadySeconds": 1, "template": {"spec": {"v": 2, "args": ["a"]}}},
}


def test_drift_is_what_an_apply_would_change(kube: KubeFake, rollouts: Rollouts) -> None:
    assert rollouts.drift(ITEM) == ["Deployment serve-x"]
    rollouts.apply(ITEM)
    assert rollouts.drift(ITEM) == [] and kube.count("PATCH", "dryRun=All") == 1
    live = kube.get(DEPLOYMENTS, "serve-x")
    live["spec"]["template"]["spec"]["args"] = ["b"]
    live["spec"]["paused"] = True  # somebody else's field, which an apply leaves
    kube.put(DEPLOYMENTS, live)
    assert rollouts.drift(ITEM) == ["spec.template.spec.args[0]"]
    assert kube.get(DEPLOYMENTS, "serve-x")["spec"]["template"]["spec"]["args"] == ["b"]  # only looked at
    rollouts.apply(ITEM)
    assert rollouts.drift(ITEM) == []


def test_replicas_that_an_autoscaler_set_are_left_alone(kube: KubeFake, rollouts: Rollouts) -> None:
    rollouts.apply(ITEM)
    assert kube.get(DEPLOYMENTS, "serve-x")["spec"]["replicas"] == 2  # at creation
    live = kube.get(DEPLOYMENTS, "serve-x")
    live["spec"]["replicas"] = 5
    owned = {"f:spec": {"f:replicas": {}}}
    scaled = {"manager": "kube-controller-manager", "subresource": "scale", "operation": "Update", "fieldsV1": owned}
    live["metadata"]["managedFields"] = [{"manager": "reprise", "fieldsV1": {"f:spec": {"f:template": {}}}}, scaled]
    kube.put(DEPLOYMENTS, live)
    kube.applied.clear()  # the server took the field from us when the autoscaler changed it
    assert rollouts.drift(ITEM) == []
    rollouts.apply(ITEM)
    assert kube.get(DEPLOYMENTS, "serve-x")["spec"]["replicas"] == 5


def test_delete_waits_for_the_last_pod(kube: KubeFake, rollouts: Rollouts) -> None:
    rollouts.apply(ITEM)
    rollouts.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "serve-x"}, "spec": {}})
    kube.foreground.add(DEPLOYMENTS)
    with pytest.raises(TryAgain, match=r"serve-x: its pods are not gone after 0\.2 s"):
        rollouts.delete("serve-x", seconds=0.2)
    assert not kube.has("/api/v1/namespaces/ns/services", "serve-x")
    threading.Timer(0.3, lambda: kube.remove(DEPLOYMENTS, "serve-x")).start()
    rollouts.delete("serve-x", seconds=5)


def test_restarts_are_counted_for_the_new_pods_alone(kube: KubeFake, rollouts: Rollouts) -> None:
    deployment(kube)
    replica_set(kube, 1)
    replica_set(kube, 2)
    new_pod(kube, 1, containerStatuses=[{"name": "c", "restartCount": 7}])
    new_pod(kube, 2, containerStatuses=[{"name": "c", "restartCount": 3}])
    assert rollouts.restarts("serve-x") == 3


def test_apply_is_server_side_and_a_refusal_is_one_sentence(kube: KubeFake, rollouts: Rollouts) -> None:
    item = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "serve-x"}, "spec": {}}
    deployment(kube)
    rollouts.apply(item)
    assert kube.count("PATCH", "fieldManager=reprise&force=true&fieldValidation=Strict$") == 1
    kube.fail("PATCH", "deployments", 422, message="spec.selector: field is immutable")
    with pytest.raises(GiveUp, match=r"refused Deployment serve-x: spec\.selector: field is immutable"):
        rollouts.apply(item)
