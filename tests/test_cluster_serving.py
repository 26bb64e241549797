"""Versions come into service on a real Kubernetes API and go back, under load; figures printed.

    KUBECONFIG=... pytest -m cluster -s tests/test_cluster_serving.py

Not covered: deploying steps that are killed or meet each other (test_cluster_serving_faults.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from deployments.kube_api import KubeApi
from deployments.workload import Resources
from tasks.deploy_model import RollbackRequest
from tests.cluster_serving_kit import Home, endpoint, serving_home, why

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
BACK = """
import json, sys
from tasks.deploy_model import RollbackRequest, roll_back
from tasks.step import from_json
print(roll_back(from_json(RollbackRequest, json.load(open(sys.argv[1])), where="rollback")).version, flush=True)
"""


@pytest.fixture(scope="module")
def home(api: KubeApi, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with serving_home(api, tmp_path_factory.mktemp("toys")) as made:
        yield made


def test_a_first_version_then_a_second_under_load_and_back(home: Home) -> None:
    first = endpoint(home.deploy(home.requests["1"]))
    assert first["url"] == f"http://serve-toy.{home.target.place.namespace}:8080/predictions/toy"
    assert (first["version"], first["previous"], first["changed"]) == ("1", None, True)
    home.holds("1")
    with home.load() as load:
        time.sleep(3)
        second = endpoint(home.deploy(home.requests["2"]))
        time.sleep(3)
    assert (second["version"], second["previous"]) == ("2", "1")
    assert load.failures == [] and load.versions == {"1", "2"}
    home.holds("2")
    print(f"\nrolling update: {second['seconds']:.1f} s; {load.told()}")
    again = endpoint(home.deploy(home.requests["2"]))
    assert not again["changed"] and home.revision() == 2
    request = RollbackRequest(
        pipeline="toy", tracking_uri=home.mlflow, record=home.record.folder, cluster=home.target, soak_seconds=1.0
    )
    began = time.monotonic()
    with home.load() as load:
        back = home.cluster.run(home.workload(request, ("python", "-c", BACK, "{request}")))
    assert back.cause == "complete", back.reason
    assert load.failures == [] and load.versions == {"1", "2"}
    home.holds("1")
    print(f"rollback: {time.monotonic() - began:.1f} s; {load.told()}")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("does not load", "the model does not load: ModuleNotFoundError: No module named 'no_such_package'"),
        ("answers wrongly", "the model answers wrongly: sample-"),
        ("its worker dies", "the model does not load: 4 worker processes died"),
        ("crash loop", "container torchserve ends at each start (exit 1)"),
        ("image missing", "image nowhere.invalid/serve:none cannot be pulled"),
        ("no node fits", "no node has enough cpu free"),
    ],
)
def test_a_bad_version_is_undone_by_itself(home: Home, kind: str, reason: str) -> None:
    home.deploy(home.requests["1"])
    place, target = home.target.place, replace(home.target, start_seconds=10.0)
    requests = {
        "does not load": home.requests["3"],
        "answers wrongly": home.requests["4"],
        "its worker dies": home.requests["5"],
        "crash loop": replace(
            home.requests["6"],
            cluster=replace(home.target, place=replace(place, env={"REPRISE_HEAP": "none"})),
        ),
        "image missing": replace(
            home.requests["6"],
            cluster=replace(
                home.target, place=replace(place, images={**place.images, "serve": "nowhere.invalid/serve:none"})
            ),
        ),
        "no node fits": replace(
            home.requests["6"], cluster=replace(target, resources=Resources(cpus=10_000, memory="1Gi"))
        ),
    }
    began = time.monotonic()
    with home.load() as load:
        outcome = home.deploy(requests[kind])
        time.sleep(1)
    assert reason in why(outcome)
    assert load.failures == [] and load.versions == {"1"}
    home.holds("1")
    assert home.record.read()["history"][-1]["outcome"] == "rolled back"
    print(f"\n{kind}: undone after {time.monotonic() - began:.1f} s: {why(outcome)[:160]}\n  {load.told()}")


def test_an_autoscalers_number_of_replicas_survives_a_rollout(home: Home) -> None:
    endpoint(home.deploy(home.requests["1"]))
    path = f"/apis/apps/v1/namespaces/{home.target.place.namespace}/deployments/serve-toy/scale"
    scale = {"spec": {"replicas": 1}}
    home.api.request(
        "PATCH", path, query={"fieldManager": "hpa"}, body=scale, content_type="application/merge-patch+json"
    )
    endpoint(home.deploy(home.requests["2"]))
    assert home.deployment()["spec"]["replicas"] == 1
    home.holds("2")
