"""The rolling update on trial: a played cluster, a stub of the registry, and the requests of three versions.

The fixtures `made` and `bench` are in conftest.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deployments.cluster_place import ClusterPlace
from deployments.cluster_target import ClusterTarget
from tasks.archive import content_digest
from tasks.audit_endpoint import Audit, AuditRequest, audit_endpoint
from tasks.deploy_model import DeployRequest, Endpoint, RollbackRequest, roll_back
from tasks.endpoint import EndpointRecord
from tasks.golden import read_golden
from tests.tasks.rolling_kit import BUDGETS, DEPLOYMENTS, NAME, SERVICES, PodCluster, pod_cluster
from tests.tasks.serving_kit import Registry, registry


@dataclass
class Bench:
    """A played cluster, a stub of the registry, and the requests of three versions."""

    pods: PodCluster
    aliases: Registry
    requests: dict[str, DeployRequest]
    record: EndpointRecord

    def truth(self) -> tuple[str | None, str | None, list[str]]:
        """(MLflow version of the record, alias, labels that answer); the Deployment's must be the record's."""
        serving, kube = self.record.serving(), self.pods.kube
        there = kube.has(DEPLOYMENTS, NAME)
        assert there == kube.has(SERVICES, NAME) == kube.has(BUDGETS, NAME) == (serving is not None)
        if there:
            applied = kube.get(DEPLOYMENTS, NAME)["spec"]["template"]["metadata"]["annotations"]["reprise.dev/label"]
            assert serving is not None and applied == serving.label
        else:
            self.pods.kube.wait(lambda: not self.pods.ready)
        alias = self.aliases.aliases.get(("toy", "champion"))
        return serving.version if serving else None, alias, self.pods.labels()

    def change_image(self, image: str) -> None:
        """Somebody's hand on the Deployment; returns when its controller has seen it."""
        kube = self.pods.kube
        with kube.lock:
            live = kube.get(DEPLOYMENTS, NAME)
            live["spec"]["template"]["spec"]["containers"][0]["image"] = image
            wanted = live["metadata"]["generation"] = live["metadata"]["generation"] + 1
            kube.put(DEPLOYMENTS, live)
        kube.wait(lambda: kube.get(DEPLOYMENTS, NAME)["status"].get("observedGeneration") == wanted)

    def label(self, version: str) -> str:
        return self.requests[version].label

    def rollback(self, to: str = "") -> Endpoint:
        some = self.requests["1"]
        return roll_back(
            RollbackRequest(
                pipeline="toy",
                to=to,
                inference_url=some.inference_url,
                tracking_uri=some.tracking_uri,
                record=some.record,
                soak_seconds=0.0,
                cluster=some.cluster,
            )
        )

    def audit(self, **more: Any) -> Audit:
        some = self.requests["1"]
        request = AuditRequest(
            pipeline="toy",
            inference_url=some.inference_url,
            tracking_uri=some.tracking_uri,
            record=some.record,
            cluster=some.cluster,
        )
        return audit_endpoint(replace(request, **more))


@contextmanager
def make_bench(made: dict[str, Any], tmp_path: Path) -> Iterator[Bench]:
    """All of it, in a folder."""
    with pod_cluster() as pods, registry() as aliases:
        cluster = ClusterTarget(
            place=ClusterPlace(images={"serve": "serve:1"}, namespace="ns"),
            kubeconfig=pods.kube.kubeconfig(tmp_path),
            start_seconds=3.0,
            ready_seconds=0.0,
            patience_seconds=0.2,
            drain_seconds=0.5,
        )
        requests, answers = {}, {}
        for version, (asked, packaged, heldout) in made.items():
            requests[version] = DeployRequest(
                key=asked.key,
                pipeline="toy",
                version=version,
                label=packaged.label,
                mar=packaged.mar,
                sha256=packaged.sha256,
                inference_url=pods.url,
                serve=asked.serve | {"response_timeout_seconds": 2},
                golden=str(heldout),
                golden_count=5,
                soak_seconds=0.0,
                tracking_uri=aliases.uri,
                record=str(tmp_path / "store" / "endpoints"),
                cluster=cluster,
            )
            answers[packaged.label] = {sample.body: sample.answer for sample in read_golden(heldout)}
            pods.digests[packaged.label] = content_digest(Path(packaged.mar))
        pods.answers = lambda label, body: answers[label][body]
        record = EndpointRecord(folder=str(tmp_path / "store" / "endpoints"), pipeline="toy")
        yield Bench(pods, aliases, requests, record)
