from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster_serving import REVISION, Rollouts
from deployments.errors import GiveUp
from deployments.kube_api import connect
from tests.deployments.kube_fake import PODS, KubeFake

Json = dict[str, Any]
DEPLOYMENTS, SETS = "/apis/apps/v1/namespaces/ns/deployments", "/apis/apps/v1/namespaces/ns/replicasets"
LABELS = {"app": "x"}


@pytest.fixture
def kube() -> Iterator[KubeFake]:
    with KubeFake() as fake:
        yield fake


@pytest.fixture
def rollouts(kube: KubeFake, tmp_path: Path) -> Iterator[Rollouts]:
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


def test_the_deadline_names_what_holds_the_new_pod(kube: KubeFake, rollouts: Rollouts) -> None:
    condition = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "m"}
    deployment(kube, conditions=[condition])
    replica_set(kube, 2)
    assert rollouts.state("serve-x").reason == "m"
    new_pod(kube, 2, containerStatuses=[{"name": "torchserve", "ready": False}])
    assert "does not answer its golden request" in rollouts.state("serve-x").reason
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "not found"}}
    new_pod(kube, 2, phase="Pending", containerStatuses=[{"name": "c", "image": "i:1", "state": waiting}])
    found = rollouts.state("serve-x")
    assert found.failed and "i:1 cannot be pulled" in found.reason


def test_patience_has_an_end(kube: KubeFake, rollouts: Rollouts) -> None:
    deployment(kube, updatedReplicas=1, availableReplicas=1)
    found = rollouts.wait("serve-x", seconds=0.2)
    assert found.failed and found.reason == "not complete after 0.2 s: 1 of 2 pods are new, 1 available"


def test_undo_takes_the_template_before(kube: KubeFake, rollouts: Rollouts) -> None:
    deployment(kube, revision=4)
    for revision in (1, 3, 4):
        replica_set(kube, revision)
    replica_set(kube, 2, owner="another")
    assert rollouts.undo("serve-x") == 3
    method, path = kube.requests[-1]
    assert method == "PATCH" and path.endswith("/deployments/serve-x")


def test_undo_of_the_first_version_says_so(kube: KubeFake, rollouts: Rollouts) -> None:
    deployment(kube, revision=1)
    replica_set(kube, 1)
    with pytest.raises(GiveUp, match="no revision before 1"):
        rollouts.undo("serve-x")
    with pytest.raises(GiveUp, match="no Deployment serve-y"):
        rollouts.state("serve-y")


def test_apply_is_server_side_and_a_refusal_is_one_sentence(kube: KubeFake, rollouts: Rollouts) -> None:
    item = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "serve-x"}, "spec": {}}
    deployment(kube)
    rollouts.apply(item)
    assert kube.count("PATCH", "fieldManager=reprise&force=true&fieldValidation=Strict") == 1
    kube.fail("PATCH", "deployments", 422, message="spec.selector: field is immutable")
    with pytest.raises(GiveUp, match=r"refused Deployment serve-x: spec\.selector: field is immutable"):
        rollouts.apply(item)
