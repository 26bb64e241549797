"""The verdict of a profile, on made-up spans and on real steps, and that it changes nothing."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training.profile import Span, StepProfile, judge
from training.progress import Progress
from training.spec import TrainResult
from training.train import main
from training.verdict import sentence_of

CPU = torch.device("cpu")


def span(name: str, start: float, end: float, *, gpu: bool = False) -> Span:
    return Span(name=name, start=start, end=end, on_gpu=gpu, own=end - start)


def steps(count: int = 2, each: float = 1000.0) -> list[Span]:
    return [span("reprise.step", i * each, (i + 1) * each) for i in range(count)]


def kernels(share: float, each: float) -> list[Span]:
    count = int(2000 * share / each)
    return [span("gemm", i * 2000 / count, i * 2000 / count + each, gpu=True) for i in range(count)]


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([*kernels(0.3, 50), span("reprise.data", 0, 600), span("reprise.data", 1000, 1600)], "data loading: 60%"),
        (kernels(0.9, 50), "well used: the GPU works 90%"),
        ([*kernels(0.2, 50), span("Memcpy HtoD (Pageable -> Device)", 0, 700, gpu=True)], "copies to the GPU: 35%"),
        (kernels(0.2, 4), "small batch"),
        (kernels(0.4, 100), "the CPU is behind"),
        ([], "on the CPU"),
    ],
)
def test_the_largest_loss_is_named(spans: list[Span], words: str) -> None:
    verdict = judge([*steps(), *spans])
    assert verdict is not None
    assert words in verdict.sentence


def test_overlapping_work_counts_once() -> None:
    verdict = judge([*steps(1), span("a", 0, 500, gpu=True), span("b", 250, 750, gpu=True)])
    assert verdict is not None and verdict.gpu_busy == 0.75


def test_without_a_whole_step_there_is_no_verdict() -> None:
    assert judge([span("gemm", 0, 5, gpu=True)]) is None


def loop(profile: StepProfile, count: int, wait: float = 0.0) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(count):
        with profile.part("data"):
            time.sleep(wait)
            batch = torch.randn(16, 64)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        profile.step()
    return model.weight.detach()


def test_real_steps_that_wait_for_data_are_told_and_stay_the_same_to_the_bit(tmp_path: Path) -> None:
    with StepProfile(tmp_path / "profile", CPU, enabled=False) as off:
        plain = loop(off, 12)
    with StepProfile(tmp_path / "profile", CPU, enabled=True, wait=2, warmup=1, active=4) as profile:
        profiled = loop(profile, 12, wait=0.08)
    assert torch.equal(plain, profiled)
    verdict = json.loads((tmp_path / "profile" / "verdict.json").read_text())
    assert verdict["steps"] == 4
    assert verdict["data"] > 0.5
    assert "data loading" in verdict["sentence"]
    with gzip.open(tmp_path / "profile" / "trace.json.gz", "rt") as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert "reprise.data" in names


def test_a_training_that_ends_while_recording_still_gets_what_there_is(tmp_path: Path) -> None:
    with StepProfile(tmp_path, CPU, enabled=True, wait=1, warmup=1, active=50) as profile:
        loop(profile, 6)
    assert json.loads((tmp_path / "verdict.json").read_text())["steps"] == 4


def test_a_disabled_one_writes_nothing(tmp_path: Path) -> None:
    with StepProfile(tmp_path / "none", CPU, enabled=False) as profile:
        loop(profile, 30)
    assert not (tmp_path / "none").exists()


def test_a_profiler_that_fails_does_not_fail_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with StepProfile(tmp_path / "file" / "below", CPU, enabled=True, wait=1, warmup=1, active=2) as profile:
        loop(profile, 8)
    assert "no profile: " in capsys.readouterr().err


@pytest.mark.parametrize("shards", [1, 3])
def test_a_profiled_training_gives_the_same_weights_and_a_verdict(
    shards: int, make_spec: Callable[..., Path], read_lines: Callable[[Path], list[dict[str, Any]]]
) -> None:
    found = {}
    for profiled in (False, True):
        spec_file = make_spec(f"profiled-{profiled}", profile=profiled, shards=shards, epochs=4, params={"norm": True})
        assert main(["--spec", str(spec_file)]) == 0
        result = TrainResult.read(spec_file.parent / "output" / "result.json")
        found[profiled] = (result.weights_sha256, result.optimizer_sha256, result.order_sha256)
        folder = spec_file.parent / "output" / "profile"
        assert folder.exists() == profiled
        assert bool(sentence_of(spec_file.parent / "output")) == profiled
        lines = [line for line in read_lines(spec_file) if "loss" in line]
        assert lines and all(line["data_seconds"] >= 0 for line in lines)
    assert found[True] == found[False]
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["steps"] == 10 and verdict["gpu_busy"] is None
    with gzip.open(folder / "trace.json.gz", "rt") as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert "reprise.data" in names and any("addmm" in str(name) for name in names)


def test_fetching_is_told_by_the_line(tmp_path: Path) -> None:
    progress = Progress(str(tmp_path / "progress.jsonl"))
    for step in range(1, 4):  # the second falls between two lines
        progress.step(step=step, max_steps=3, epoch=0, loss=1.0, data_seconds=0.25, always=step == 3)
    progress.close()
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [(line["step"], line["data_seconds"]) for line in lines] == [(1, 0.25), (3, 0.5)]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_verdict_that_is_none_is_no_verdict(text: str, tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    assert sentence_of(tmp_path) == ""
    (tmp_path / "profile" / "verdict.json").write_text(text)
    assert sentence_of(tmp_path) == ""


@pytest.mark.gpu
def test_on_a_gpu_small_steps_are_told_from_large_ones(tmp_path: Path) -> None:
    device = torch.device("cuda")

    def run(size: int, folder: Path) -> str:
        model = torch.nn.Sequential(*(torch.nn.Linear(size, size) for _ in range(8))).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        batch = torch.randn(size, size, device=device)
        with StepProfile(folder, device, enabled=True, wait=5, warmup=3, active=10) as profile:
            for _ in range(20):
                with profile.part("data"):
                    inputs = batch * 1.0
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                optimizer.step()
                profile.step()
        return str(json.loads((folder / "verdict.json").read_text())["sentence"])

    assert "small batch" in run(32, tmp_path / "small")
    assert "well used" in run(4096, tmp_path / "large")
