"""Rollouts of a served model on a real Kubernetes API: under load, a bad version, an archive that is not ours."""

from __future__ import annotations

import base64
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster import Cluster
from deployments.cluster_serving import Rollouts, RolloutState
from deployments.errors import GiveUp, TryAgain
from deployments.manifests import ClusterPlace
from deployments.serving import call
from deployments.serving_manifests import Serving, serving_objects
from deployments.workload import Resources
from tasks.package_model import package_model
from tests.cluster_kit import needs_rig
from tests.tasks.serving_kit import make_toy, package_request

pytestmark = pytest.mark.cluster


class Load:
    """Golden requests without a pause from several threads; what went wrong is kept."""

    def __init__(self, url: str, rows: list[dict[str, Any]], threads: int = 2) -> None:
        self.url, self.rows, self.answers, self.failures = url, rows, 0, list[str]()
        self.versions: set[str] = set()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(0.02):
            row = self.rows[number % len(self.rows)]
            number += 1
            try:
                answer = call("POST", f"{self.url}/predictions/toy", base64.b64decode(row["body_b64"]), timeout=30)
            except TryAgain as error:
                self.failures.append(str(error))
                continue
            self.answers += 1
            document = answer.document()
            if answer.status != 200 or document.get("label") != row["answer"]["label"]:
                self.failures.append(f"{answer.status} {document}")
            self.versions.add(str(document.get("model_version")))

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(35)


def test_a_rolling_update_and_a_bad_version_lose_no_request(
    cluster: Cluster, place: ClusterPlace, tmp_path: Path
) -> None:
    needs_rig()
    assert cluster.state is not None
    toy = make_toy(tmp_path / "toy")
    models = cluster.state / "models"
    models.mkdir()
    (cluster.state / "heldout.jsonl").write_text(toy.heldout.read_text())
    rollouts = Rollouts(cluster.api, place.namespace)

    def serving(version: int, flipped: bool = False) -> Serving:
        made = make_toy(tmp_path / f"toy{version}", flipped=flipped) if flipped else toy
        packed = package_model(package_request(made, models, version))
        return Serving(
            pipeline="toy",
            version=str(version),
            label=packed.label,
            mar=f"/reprise/models/{Path(packed.mar).name}",
            sha256=packed.sha256,
            golden="/reprise/heldout.jsonl",
            replicas=1,
            resources=Resources(cpus=0.2, memory="3Gi"),
            response_timeout=10,
            drain_seconds=4,
            soak_seconds=1,
        )

    def deploy(wanted: Serving) -> RolloutState:
        for item in serving_objects(wanted, place):
            rollouts.apply(item)
        return rollouts.wait(wanted.name, seconds=240, on_change=print)

    first = deploy(serving(1))
    assert first.complete, first.reason
    service = cluster.api.get(f"/api/v1/namespaces/{place.namespace}/services/serve-toy")
    rows = [json.loads(line) for line in toy.heldout.read_text().splitlines()]
    load = Load(f"http://{service['spec']['clusterIP']}:8080", rows)
    try:
        second = deploy(serving(2))
        assert second.complete and second.revision > first.revision, second.reason
        third = deploy(serving(3, flipped=True))
        assert third.failed and "answers wrongly" in third.reason, third.reason
        assert rollouts.undo("serve-toy") == second.revision
        back = rollouts.wait("serve-toy", seconds=120)
        assert back.complete, back.reason
        time.sleep(2)
    finally:
        load.stop()
    assert load.failures == [] and load.answers > 100
    assert load.versions == {"1", "2"}  # never the bad one
    print(f"{load.answers} requests, {len(load.failures)} failed")


def test_an_archive_that_is_not_the_one_packaged_is_never_served(cluster: Cluster, place: ClusterPlace) -> None:
    needs_rig()
    assert cluster.state is not None
    (cluster.state / "tampered.mar").write_bytes(b"PK")
    wanted = Serving(
        pipeline="tampered",
        version="1",
        label="1.0",
        mar="/reprise/tampered.mar",
        sha256="0" * 64,
        golden="/reprise/none",
        replicas=1,
        resources=Resources(cpus=0.05, memory="64Mi"),
    )
    rollouts = Rollouts(cluster.api, place.namespace)
    for item in serving_objects(wanted, place):
        rollouts.apply(item)
    state = rollouts.wait(wanted.name, seconds=120)
    assert state.failed and "packaged was 000" in state.reason, state.reason
    with pytest.raises(GiveUp, match="no revision before 1"):
        rollouts.undo(wanted.name)
