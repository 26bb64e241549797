"""The wrapper with real torchrun agents and workers: exit codes, notice, kills, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.launch import Launch, descendants, main, node_flags
from training.spec import CheckpointPolicy, TrainResult, read_spec
from training.standby import Agent

MakeSpec = Callable[..., Path]
ReadLines = Callable[[Path], list[dict[str, Any]]]


def start(spec_file: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "training.launch", "--spec", str(spec_file), *arguments]
    return subprocess.Popen(command, env=os.environ | {"REPRISE_PROGRESS_EVERY": "0"})


def launch(spec_file: Path, *arguments: str) -> int:
    return start(spec_file, *arguments).wait(120)


def hashes(spec_file: Path) -> tuple[str, str, str]:
    result = TrainResult.read(spec_file.parent / "output" / "result.json")
    return result.weights_sha256, result.optimizer_sha256, result.order_sha256


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"it did not come; exit {process.poll()}")


@pytest.fixture(scope="module")
def slow() -> dict[str, Any]:
    """Settings of a training of about two seconds, saved every five steps."""
    return {"params": {"slow": 0.004, "norm": True}, "shards": 4, "epochs": 5}


def test_any_number_of_workers_gives_the_same_bits_and_a_finished_one_is_not_repeated(
    make_spec: MakeSpec, read_lines: ReadLines
) -> None:
    found = []
    for workers in (1, 2, 4):
        spec_file = make_spec(f"workers-{workers}", shards=4, params={"norm": True})
        assert launch(spec_file, "--processes", str(workers)) == 0
        found.append(hashes(spec_file))
    assert found[0] == found[1] == found[2]
    lines = len(read_lines(spec_file))
    began = time.monotonic()
    assert main(["--spec", str(spec_file), "--processes", "2"]) == 0
    assert time.monotonic() - began < 1
    assert len(read_lines(spec_file)) == lines


def test_a_notice_saves_exits_143_and_a_smaller_world_resumes_exactly(
    make_spec: MakeSpec, read_lines: ReadLines, slow: dict[str, Any]
) -> None:
    whole = make_spec("whole", **slow)
    assert launch(whole, "--processes", "2") == 0
    spec_file = make_spec("cut", **slow | {"checkpoint": CheckpointPolicy(every_steps=5)})
    process = start(spec_file, "--processes", "2")
    wait_for(lambda: any(line.get("step", 0) >= 7 for line in read_lines(spec_file) if "loss" in line), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    lines = read_lines(spec_file)
    saved = next(line for line in lines if line.get("event") == "saved")
    assert saved["step"] == max(line["step"] for line in lines if "loss" in line), "with notice no step is lost"
    assert any(line.get("event") == "notice" for line in lines)
    assert launch(spec_file, "--processes", "1") == 0
    assert next(line for line in read_lines(spec_file) if line.get("event") == "resumed")["step"] == saved["step"]
    assert hashes(spec_file) == hashes(whole)


@pytest.mark.parametrize("target", ["worker", "agent"])
def test_a_kill_without_notice_is_restarted_here_exactly(
    make_spec: MakeSpec, read_lines: ReadLines, slow: dict[str, Any], target: str
) -> None:
    whole = make_spec("whole", **slow)
    assert launch(whole, "--processes", "2") == 0
    spec_file = make_spec("killed", **slow)
    process = start(spec_file, "--processes", "2")
    wait_for(lambda: any(line.get("step", 0) >= 7 for line in read_lines(spec_file) if "loss" in line), process)
    lines = read_lines(spec_file)
    worker = next(line["pid"] for line in lines if line.get("event") == "worker" and line["rank"] == 1)
    agent = next(line["agent"] for line in lines if line.get("event") == "started")
    os.kill(worker if target == "worker" else agent, signal.SIGKILL)
    assert process.wait(60) == 0
    assert [line["event"] for line in read_lines(spec_file) if line.get("event") == "restarted"] == ["restarted"]
    assert hashes(spec_file) == hashes(whole)


def test_a_sharded_model_learns_the_same_and_resumes_exactly(make_spec: MakeSpec, read_lines: ReadLines) -> None:
    settings: dict[str, Any] = {"params": {"slow": 0.004, "norm": True}, "epochs": 3}
    found = {}
    for parallel in ("ddp", "fsdp"):
        whole = make_spec(parallel, parallel=parallel, **settings)
        assert launch(whole, "--processes", "2") == 0
        found[parallel] = TrainResult.read(whole.parent / "output" / "result.json").metrics["loss"]
    assert found["fsdp"] == pytest.approx(found["ddp"], rel=1e-4)
    spec_file = make_spec("killed", parallel="fsdp", **settings)
    process = start(spec_file, "--processes", "2")
    wait_for(lambda: any(line.get("step", 0) >= 7 for line in read_lines(spec_file) if "loss" in line), process)
    os.kill(next(line["pid"] for line in read_lines(spec_file) if line.get("event") == "worker"), signal.SIGKILL)
    assert process.wait(60) == 0
    assert hashes(spec_file) == hashes(whole)


def test_a_sharded_model_on_another_number_of_workers_is_refused_or_resharded(make_spec: MakeSpec) -> None:
    spec_file = make_spec(parallel="fsdp", checkpoint=CheckpointPolicy(every_steps=5), deterministic=False)
    assert launch(spec_file, "--processes", "2") == 0
    (spec_file.parent / "output" / "result.json").unlink()
    assert launch(spec_file, "--processes", "3") == 0
    strict = make_spec("strict", parallel="fsdp", shards=2)
    assert launch(strict, "--processes", "3") == 2


def test_without_restarts_a_killed_worker_is_an_interruption(
    make_spec: MakeSpec, read_lines: ReadLines, slow: dict[str, Any]
) -> None:
    spec_file = make_spec(**slow)
    process = start(spec_file, "--processes", "2", "--restarts", "0")
    wait_for(lambda: any("loss" in line for line in read_lines(spec_file)), process)
    os.kill(next(line["pid"] for line in read_lines(spec_file) if line.get("event") == "worker"), signal.SIGKILL)
    assert process.wait(60) == 143


def test_a_killed_wrapper_leaves_no_process(make_spec: MakeSpec, read_lines: ReadLines, slow: dict[str, Any]) -> None:
    spec_file = make_spec(**slow | {"epochs": 500})
    process = start(spec_file, "--processes", "2")
    wait_for(lambda: any("loss" in line for line in read_lines(spec_file)), process)
    below = list(descendants(process.pid))
    assert len(below) == 3, "the agent and two workers"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in below) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in below)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_an_agent_that_does_not_see_its_workers_end_is_not_waited_for(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.launch.ALONE", 0.3)
    spec_file = make_spec()
    nodes = node_flags({})
    one = Launch(spec=read_spec(spec_file), spec_file=spec_file, processes=1, grace=30, restarts=0, nodes=nodes)
    stuck = subprocess.Popen(["/bin/sh", "-c", "sleep 0.5 & wait; exec sleep 60"])
    try:
        one.agent = Agent(stuck.pid)
        began = time.monotonic()
        one._wait()
        assert 0.7 <= time.monotonic() - began < 20
    finally:
        stuck.kill()
        stuck.wait()


def test_a_bug_exits_1_once_and_names_the_worker(
    make_spec: MakeSpec, read_lines: ReadLines, capfd: pytest.CaptureFixture[str]
) -> None:
    spec_file = make_spec(params={"fail_at": 10})
    assert launch(spec_file, "--processes", "2") == 1
    err = capfd.readouterr().err
    assert "RuntimeError: a bug in the data set" in err and "training.launch: exit 1: worker" in err
    assert not [line for line in read_lines(spec_file) if line.get("event") == "restarted"]


def test_a_spec_that_cannot_be_trained_exits_2(make_spec: MakeSpec, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(make_spec(batch_size=1000), "--processes", "2") == 2
    err = capfd.readouterr().err
    assert "the training split has 96 samples" in err and "Traceback" not in err


def test_arguments_are_checked(make_spec: MakeSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--spec", str(make_spec()), "--processes", "0"]) == 2
    assert "--processes is 0" in capsys.readouterr().err
    assert main(["--spec", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_nodes_come_from_the_environment_of_a_pytorchjob() -> None:
    assert "--rdzv-endpoint=localhost:0" in node_flags({})
    assert node_flags({"PET_NNODES": "2"}) == ()
    plain = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "3", "RANK": "2"}
    assert node_flags(plain) == ("--nnodes=3", "--node-rank=2", "--master-addr=job-master-0", "--master-port=23456")
