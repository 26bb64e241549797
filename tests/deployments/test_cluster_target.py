from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster_place import ClusterPlace
from deployments.cluster_target import ClusterTarget, in_service
from deployments.errors import GiveUp
from deployments.workload import Resources
from tasks.deploy_model import deploy_model
from tasks.step import read_request
from tests.deployments.kube_fake import KubeFake

DEPLOYMENTS = "/apis/apps/v1/namespaces/ns/deployments"
TARGET = ClusterTarget(place=ClusterPlace(images={"serve": "s:1"}, namespace="ns"), replicas=2)


def deployment(label: str, **status: Any) -> dict[str, Any]:
    template = {"metadata": {"annotations": {"reprise.dev/label": label}}}
    status = {"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2, **status}
    return {"metadata": {"name": "serve-my-digits", "generation": 2}, "spec": {"template": template}, "status": status}


def test_the_version_in_service_is_the_only_one_that_answers(tmp_path: Path) -> None:
    with KubeFake() as kube:
        target = replace(TARGET, kubeconfig=kube.kubeconfig(tmp_path))
        assert in_service(target, "my_digits") == ""
        kube.put(DEPLOYMENTS, deployment("3.x"))
        assert in_service(target, "my_digits") == "3.x"
        kube.put(DEPLOYMENTS, deployment("3.x", availableReplicas=1))  # a node is gone: it serves all the same
        assert in_service(target, "my_digits") == "3.x"
        for under_way in ({"updatedReplicas": 1}, {"availableReplicas": 0}, {"observedGeneration": 1}):
            kube.put(DEPLOYMENTS, deployment("4.x", **under_way))
            assert in_service(target, "my_digits") == ""


def test_looking_raises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.cluster_target.LOOK_SECONDS", 0.2)
    with KubeFake() as kube:
        target = replace(TARGET, kubeconfig=kube.kubeconfig(tmp_path))
        for status in (401, 403, 410, 503):
            kube.fail("GET", "deployments", status)
            assert in_service(target, "digits") == ""
    assert in_service(target, "digits") == ""  # nobody listens
    assert in_service(replace(target, kubeconfig=str(tmp_path / "none")), "digits") == ""


def test_it_travels_in_a_request() -> None:
    target = replace(TARGET, resources=Resources(cpus=0.5, memory="1Gi", gpus=1), kubeconfig="k")
    request = {
        **{name: "x" for name in ("key", "pipeline", "version", "label", "mar", "sha256", "golden", "record")},
        "tracking_uri": "http://m",
        "cluster": asdict(target),
    }
    read = read_request(deploy_model, json.loads(json.dumps(request)))
    assert json.dumps(asdict(read.cluster)) == json.dumps(asdict(target))
    assert read_request(deploy_model, {**request, "cluster": None}).cluster is None
    with pytest.raises(GiveUp, match=r"deploy_model\.cluster\.replica: unknown field of ClusterTarget"):
        read_request(deploy_model, {**request, "cluster": {"replica": 3}})
    assert target.without_access().kubeconfig == ""
    assert target.url("My_Digits") == "http://serve-my-digits.ns:8080"
