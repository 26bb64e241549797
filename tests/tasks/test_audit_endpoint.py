"""The audit finds each way in which record, registry, server and archive can disagree, and repairs what can be."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from deployments.errors import GiveUp
from tasks.audit_endpoint import Audit, AuditRequest, audit_endpoint
from tasks.deploy_model import DeployRequest, deploy_model
from tasks.endpoint import EndpointRecord, Version
from tasks.golden import read_golden
from tests.tasks.serving_kit import Registry, deploy_request, make_toy, package, registry
from tests.tasks.torchserve_stub import Stub, torchserve_stub


@dataclass
class Place:
    stub: Stub
    aliases: Registry
    first: DeployRequest
    second: DeployRequest
    request: AuditRequest

    def found(self) -> list[str]:
        return [finding.what for finding in audit_endpoint(self.request).findings]

    def repaired(self) -> Audit:
        return audit_endpoint(replace(self.request, repair=True))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Version 2 in service, after version 1."""
    with torchserve_stub(tmp_path / "models") as stub, registry() as aliases:
        record, requests, answers = tmp_path / "store" / "endpoints", [], {}
        for version in (1, 2):
            toy = make_toy(tmp_path / f"toy{version}", seed=version, samples=5)
            asked, packaged = package(toy, tmp_path / "models", version)
            requests.append(
                deploy_request(asked, packaged, toy.heldout, stub.client, aliases.uri, record, soak_seconds=0.0)
            )
            answers[packaged.label] = {sample.body: sample.answer for sample in read_golden(toy.heldout)}
        stub.answers = lambda label, body: answers[label][body]
        for one in requests:
            deploy_model(one)
        audit = AuditRequest(
            pipeline="toy",
            management_url=stub.client.management_url,
            inference_url=stub.client.inference_url,
            tracking_uri=aliases.uri,
            record=str(record),
        )
        yield Place(stub, aliases, requests[0], requests[1], audit)


def test_clean_after_deployments(place: Place) -> None:
    audit = audit_endpoint(place.request)
    assert audit.clean and audit.findings == [] and not audit.repaired
    assert (audit.version, audit.label, audit.sha256) == ("2", place.second.label, place.second.sha256)


def test_an_alias_moved_by_hand(place: Place) -> None:
    place.aliases.aliases["toy", "champion"] = "1"
    assert place.found() == ["alias champion"]
    assert place.repaired().clean and place.aliases.aliases["toy", "champion"] == "2"


def test_a_default_moved_by_hand(place: Place) -> None:
    place.stub.client.register("toy", Path(place.first.mar).name, workers=1)
    place.stub.client.set_default("toy", place.first.label)
    assert place.found() == [
        "default version",
        "left over on the server",
        "label that answers",
        "digest of the served files",
    ]
    audit = place.repaired()
    assert audit.clean and len(audit.findings) == 4
    assert [found.label for found in place.stub.client.versions("toy")] == [place.second.label]


def test_a_server_that_came_back_empty(place: Place) -> None:
    place.stub.models.clear()
    assert place.found() == ["default version"]
    assert place.repaired().clean


def test_an_archive_changed_in_the_store(place: Place) -> None:
    mar = Path(place.second.mar)
    data = bytearray(mar.read_bytes())
    data[-400] ^= 1
    mar.write_bytes(bytes(data))
    assert "sha256 of " + mar.name in place.found()
    with pytest.raises(GiveUp, match="packaged was"):
        place.repaired()
    mar.unlink()
    assert place.found() == ["sha256 of " + mar.name]
    with pytest.raises(GiveUp, match="is missing from the model store"):
        place.repaired()


def test_a_server_that_loaded_other_bytes(place: Place) -> None:
    """The file was swapped while it loaded, and swapped back."""
    place.stub.models["toy"][place.second.label].digest = "f" * 64
    assert place.found() == ["digest of the served files"]
    with pytest.raises(GiveUp, match=r"loaded other files than .* restart it"):
        place.repaired()


def test_a_transaction_that_a_kill_left(place: Place) -> None:
    record = EndpointRecord(folder=place.request.record, pipeline="toy")
    first = Version(
        version="1", label=place.first.label, mar=place.first.mar, sha256=place.first.sha256, golden=place.first.golden
    )
    record.begin("deploy", first, "2")
    record.phase("aliasing")
    place.stub.client.register("toy", Path(place.first.mar).name, workers=1)
    place.aliases.aliases["toy", "champion"] = "1"
    assert place.found() == ["unfinished transaction", "alias champion", "left over on the server"]
    assert place.repaired().clean and record.read()["history"][-1]["outcome"] == "rolled back"


def test_nothing_in_service(place: Place, tmp_path: Path) -> None:
    request = replace(place.request, record=str(tmp_path / "other" / "endpoints"), pipeline="unknown")
    audit = audit_endpoint(request)
    assert audit.clean and audit.version == audit.label == audit.sha256 == ""


def test_told_to_end_while_it_waits_for_a_rollout(place: Place, tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    request.write_text(json.dumps(asdict(place.request)))
    command = [sys.executable, "-m", "tasks.step", "audit_endpoint", str(request), str(tmp_path / "result.json")]
    record = EndpointRecord(folder=place.request.record, pipeline="toy")
    with record.lock(1):
        process = subprocess.Popen(command)
        try:
            until = time.monotonic() + 20
            while record.store.path / "locks" / "endpoint-toy" not in open_files(process.pid):
                assert time.monotonic() < until and process.poll() is None
                time.sleep(0.02)
            process.terminate()
            assert process.wait(10) == 143
        finally:
            process.kill()
            process.wait()
    assert not (tmp_path / "result.json").exists()


def open_files(pid: int) -> list[Path]:
    """What a process has open now."""
    found = []
    for number in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed this moment
            found.append(number.readlink())
    return found
