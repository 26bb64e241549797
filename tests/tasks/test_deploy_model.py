"""Packaging, deploying, checking and rolling back against a real TorchServe; the registry's alias API is a stub."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.errors import GiveUp, TryAgain
from tasks.check_endpoint import CheckRequest, check_endpoint
from tasks.deploy_model import DeployRequest, RollbackRequest, deploy_model, roll_back
from tasks.endpoint import EndpointRecord
from tests.tasks.serving_kit import MODULE, Registry, Serving, deploy_request, make_toy, package, registry, torchserve

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
PORT = 18090


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with torchserve(tmp_path_factory.mktemp("ts"), PORT) as running:
        yield running


@pytest.fixture
def aliases() -> Iterator[Registry]:
    with registry() as stub:
        yield stub


@pytest.fixture(autouse=True)
def empty(serving: Serving) -> None:
    """Each test begins with a server that holds nothing."""
    for version in sorted(serving.server.versions("toy"), key=lambda found: found.default):
        serving.server.unregister("toy", version.label)


def request_for(
    tmp_path: Path, serving: Serving, aliases: Registry, version: int, flipped: bool = False, **more: object
) -> DeployRequest:
    toy = make_toy(tmp_path / f"toy{version}", seed=version, flipped=flipped)
    asked, packaged = package(toy, serving.store, version)
    return deploy_request(
        asked, packaged, toy.heldout, serving.server, aliases.uri, tmp_path / "store" / "endpoints", **more
    )


def in_service(serving: Serving) -> list[str]:
    return [found.label for found in serving.server.versions("toy") if found.default]


def test_a_second_version_replaces_the_first_and_both_are_the_torch_model(
    tmp_path: Path, serving: Serving, aliases: Registry
) -> None:
    first = deploy_model(request_for(tmp_path, serving, aliases, 1))
    assert (first.version, first.previous, first.changed) == ("1", None, True)
    request = request_for(tmp_path, serving, aliases, 2)
    second = deploy_model(request)
    assert (second.version, second.previous, second.changed) == ("2", "1", True)
    assert [found.label for found in serving.server.versions("toy")] == [request.label]
    assert aliases.aliases == {("toy", "champion"): "2"}

    checked = check_endpoint(CheckRequest(url=second.url, pipeline="toy", version="2", heldout=request.golden))
    assert checked.agreement == 1.0 and checked.samples == 40 and checked.accuracy == checked.model_accuracy
    assert 0 < checked.p50_ms <= checked.p95_ms

    again = deploy_model(request)  # nothing is done twice
    assert not again.changed and again.previous == "1"
    assert aliases.moves == ["1", "2"]

    record = EndpointRecord(folder=request.record, pipeline="toy")
    back = roll_back(
        RollbackRequest(
            pipeline="toy",
            management_url=request.management_url,
            inference_url=request.inference_url,
            tracking_uri=aliases.uri,
            record=request.record,
        )
    )
    assert back.version == "1" and back.previous == "2" and in_service(serving) == [first.label]
    assert aliases.aliases == {("toy", "champion"): "1"}
    assert [row["kind"] for row in record.read()["history"]] == ["deploy", "deploy", "rollback"]
    with pytest.raises(GiveUp, match=r"2 of 40|40 of 40|answers are not"):
        check_endpoint(CheckRequest(url=second.url, pipeline="toy", version="2", heldout=request.golden))


def test_wrong_answers_never_get_traffic(tmp_path: Path, serving: Serving, aliases: Registry) -> None:
    good = deploy_model(request_for(tmp_path, serving, aliases, 1))
    bad = request_for(tmp_path, serving, aliases, 2, flipped=True)
    with pytest.raises(GiveUp, match=r"20 of 20 golden requests answered wrongly; first sample-000: label"):
        deploy_model(bad)
    assert [found.label for found in serving.server.versions("toy")] == [good.label]
    assert aliases.moves == ["1"]
    record = EndpointRecord(folder=bad.record, pipeline="toy").read()
    assert record["transaction"] is None and record["serving"]["label"] == good.label
    assert record["history"][-1]["outcome"] == "rolled back" and "answered wrongly" in record["history"][-1]["why"]


def test_a_registry_that_fails_at_the_last_moment_leaves_the_old_version(
    tmp_path: Path, serving: Serving, aliases: Registry
) -> None:
    good = deploy_model(request_for(tmp_path, serving, aliases, 1))
    aliases.fail = 1
    request = request_for(tmp_path, serving, aliases, 2)
    with pytest.raises(TryAgain, match="asked to fail"):
        deploy_model(request)
    assert in_service(serving) == [good.label] and aliases.aliases == {("toy", "champion"): "1"}
    assert deploy_model(request).version == "2"


def test_a_server_that_came_back_empty_gets_its_version_again(
    tmp_path: Path, serving: Serving, aliases: Registry
) -> None:
    request = request_for(tmp_path, serving, aliases, 1)
    deploy_model(request)
    serving.server.unregister("toy", request.label)
    assert serving.server.versions("toy") == []
    again = deploy_model(request)
    assert again.version == "1" and in_service(serving) == [request.label]


def test_only_serve_settings_changed_means_a_new_label_and_no_new_alias(
    tmp_path: Path, serving: Serving, aliases: Registry
) -> None:
    toy = make_toy(tmp_path / "toy", seed=1)
    record = tmp_path / "store" / "endpoints"
    labels = []
    for batch in (4, 16):
        asked, packaged = package(toy, serving.store, 1, serve={"batch_size": batch})
        deploy_model(deploy_request(asked, packaged, toy.heldout, serving.server, aliases.uri, record))
        labels.append(packaged.label)
    assert labels[0] != labels[1] and in_service(serving) == [labels[1]]
    assert aliases.aliases == {("toy", "champion"): "1"}


def test_a_changed_archive_is_refused_before_anything_happens(
    tmp_path: Path, serving: Serving, aliases: Registry
) -> None:
    request = request_for(tmp_path, serving, aliases, 1)
    with pytest.raises(GiveUp, match="packaged was"):
        deploy_model(replace(request, sha256="0" * 64))
    assert serving.server.versions("toy") == [] and aliases.moves == []


SLEEPER = MODULE.replace(
    'values = json.loads(body)["values"]',
    'values = json.loads(body)["values"]\n    import time; time.sleep(json.loads(body).get("sleep", 0))',
)


def test_slow_requests_under_way_are_answered_before_their_version_is_removed(
    tmp_path: Path, serving: Serving, aliases: Registry
) -> None:
    """Two workers, requests of a second, more of them than workers: what TorchServe's own removal loses."""
    record = tmp_path / "store" / "endpoints"
    requests = []
    for version in (1, 2):
        toy = make_toy(tmp_path / f"toy{version}", seed=version, module=SLEEPER)
        asked, packaged = package(toy, serving.store, version, serve={"workers": 2, "batch_size": 1})
        requests.append(deploy_request(asked, packaged, toy.heldout, serving.server, aliases.uri, record))
    deploy_model(requests[0])
    stop, answers = threading.Event(), list[tuple[int, str]]()

    def client() -> None:
        while not stop.is_set():
            answer = serving.server.predict("toy", b'{"values": [1, 2, 3, 4], "sleep": 1.0}', timeout=40)
            answers.append((answer.status, answer.document().get("model_version", "")))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    # The switch is not held up by the load, only judged less strictly: golden requests queue behind it.
    deploy_model(replace(requests[1], max_p95_seconds=30.0, golden_count=2, soak_seconds=0.0))
    stop.set()
    for thread in threads:
        thread.join()
    assert {status for status, _ in answers} == {200} and {version for _, version in answers} == {"1", "2"}
    assert [found.label for found in serving.server.versions("toy")] == [requests[1].label]
    assert not (serving.state / "key_file.json").exists()  # no token file where authorization is off


def test_a_module_that_cannot_be_imported_is_told_and_removed_quickly(
    tmp_path: Path, serving: Serving, aliases: Registry
) -> None:
    good = deploy_model(request_for(tmp_path, serving, aliases, 1))
    toy = make_toy(tmp_path / "broken", seed=2, module="import no_such_package\n")
    asked, packaged = package(toy, serving.store, 2)
    began = time.monotonic()
    record, logs = tmp_path / "store" / "endpoints", str(serving.state / "logs")
    request = deploy_request(asked, packaged, toy.heldout, serving.server, aliases.uri, record, server_logs=logs)
    with pytest.raises(
        GiveUp, match="worker died 4 times while loading; ModuleNotFoundError: No module named 'no_such"
    ):
        deploy_model(request)
    assert time.monotonic() - began < 60
    assert [found.label for found in serving.server.versions("toy")] == [good.label]
