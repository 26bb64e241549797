"""Every held-out answer is compared; what is wrong is named."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import GiveUp, TryAgain
from tasks.check_endpoint import CheckRequest, check_endpoint
from tasks.golden import read_golden
from tests.tasks.serving_kit import make_toy, package
from tests.tasks.torchserve_stub import Stub, torchserve_stub


@dataclass
class Ready:
    stub: Stub
    request: CheckRequest
    label: str
    answers: dict[bytes, dict[str, Any]]


@pytest.fixture
def ready(tmp_path: Path) -> Iterator[Ready]:
    toy = make_toy(tmp_path / "toy")
    _, packaged = package(toy, tmp_path / "models")
    with torchserve_stub(tmp_path / "models") as stub:
        answers = {sample.body: dict(sample.answer) for sample in read_golden(toy.heldout)}
        stub.answers = lambda label, body: answers[body]
        stub.client.register("toy", Path(packaged.mar).name, workers=1)
        url = f"{stub.client.inference_url}/predictions/toy"
        request = CheckRequest(url=url, pipeline="toy", version="1", heldout=str(toy.heldout))
        yield Ready(stub, request, packaged.label, answers)


def test_an_endpoint_that_is_the_torch_model(ready: Ready) -> None:
    result = check_endpoint(ready.request)
    assert (result.samples, result.agreement, result.accuracy, result.max_difference) == (40, 1.0, 1.0, 0.0)
    assert result.disagreements == [] and 0 < result.p50_ms <= result.p95_ms


def test_one_wrong_answer_of_forty_is_named(ready: Ready) -> None:
    body = list(ready.answers)[7]
    ready.answers[body]["label"] = 9
    with pytest.raises(GiveUp, match=r"1 of 40 answers .*agreement 0\.9750, wanted 1\); first sample-007: label 9"):
        check_endpoint(ready.request)
    result = check_endpoint(replace(ready.request, min_agreement=0.9))
    assert result.disagreements == ["sample-007"] and result.agreement == 0.975
    assert (result.accuracy, result.model_accuracy) == (0.975, 1.0)


def test_small_differences_are_measured_not_refused(ready: Ready) -> None:
    next(iter(ready.answers.values()))["probabilities"][0] += 5e-5
    assert check_endpoint(ready.request).max_difference == pytest.approx(5e-5, rel=1e-3)


def test_answers_of_another_version(ready: Ready) -> None:
    with pytest.raises(GiveUp, match="model_version '1', expected '2'"):
        check_endpoint(replace(ready.request, version="2"))


def test_errors_are_disagreements(ready: Ready) -> None:
    ready.stub.faults[ready.label] = "raises"
    with pytest.raises(GiveUp, match=r"40 of 40 answers .* status 503"):
        check_endpoint(ready.request)


def test_too_slow(ready: Ready) -> None:
    ready.stub.faults[ready.label] = "slow"
    with pytest.raises(GiveUp, match=r"p95 is 2\d\d\.\d ms, allowed 100 ms; lower serve\.batch_size"):
        check_endpoint(replace(ready.request, samples=3, max_p95_seconds=0.1))


def test_unlabelled_samples(ready: Ready, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in Path(ready.request.heldout).read_text().splitlines()]
    (tmp_path / "h.jsonl").write_text("\n".join(json.dumps(row | {"label": None}) for row in lines))
    result = check_endpoint(replace(ready.request, heldout=str(tmp_path / "h.jsonl"), samples=5))
    assert result.samples == 5 and result.agreement == 1.0 and result.accuracy == 0.0


def test_a_server_that_is_away_and_a_url_that_is_none(ready: Ready) -> None:
    with pytest.raises(TryAgain, match="Connection"):
        check_endpoint(replace(ready.request, url="http://127.0.0.1:1/predictions/toy"))
    with pytest.raises(GiveUp, match="expected http://host:port"):
        check_endpoint(replace(ready.request, url="127.0.0.1:8080"))


def test_latency_is_of_requests_not_of_the_first_connection(ready: Ready) -> None:
    began = time.monotonic()
    result = check_endpoint(ready.request)
    assert result.p50_ms * 40 / 1000 <= time.monotonic() - began
