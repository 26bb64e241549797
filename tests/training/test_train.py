"""The loop with one worker, in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from training.checkpoint import Checkpointer
from training.spec import CheckpointPolicy, TrainResult
from training.train import main

MakeSpec = Callable[..., Path]
ReadLines = Callable[[Path], list[dict[str, Any]]]


def train(spec_file: Path) -> TrainResult:
    assert main(["--spec", str(spec_file)]) == 0
    return TrainResult.read(spec_file.parent / "output" / "result.json")


def hashes(result: TrainResult) -> tuple[str, str, str]:
    return result.weights_sha256, result.optimizer_sha256, result.order_sha256


def test_a_training_leaves_everything_behind(make_spec: MakeSpec, read_lines: ReadLines) -> None:
    spec_file = make_spec(params={"norm": True}, samples=7)
    result = train(spec_file)
    assert (result.step, result.max_steps, result.samples_seen) == (16, 16, 192)
    output = spec_file.parent / "output"
    assert json.loads((output / "metrics.json").read_text())["samples"] == 30
    assert result.metrics["accuracy"] > 0.6
    rows = [json.loads(line) for line in (output / "heldout.jsonl").read_text().splitlines()]
    assert len(rows) == 7 and set(rows[0]) == {"name", "body_b64", "label", "answer"}
    assert len(safetensors.torch.load_file(output / "model.safetensors")) == 9
    lines = read_lines(spec_file)
    assert next(line["step"] for line in lines if "loss" in line) == 1 and lines[-1]["event"] == "complete"
    assert [line["step"] for line in lines if line.get("event") == "checkpoint"] == [5, 10, 15, 16]


def test_the_same_spec_gives_the_same_hashes_and_another_seed_others(make_spec: MakeSpec) -> None:
    one, again = train(make_spec("one")), train(make_spec("again"))
    other = train(make_spec("other", seed=1))
    assert hashes(one) == hashes(again)
    assert not set(hashes(one)) & set(hashes(other))


@pytest.mark.parametrize("changes", [{"shards": 3}, {"accumulate": 3}, {"precision": "bfloat16"}])
def test_resumed_at_any_checkpoint_it_ends_with_the_same_hashes(make_spec: MakeSpec, changes: dict[str, Any]) -> None:
    changes = {**changes, "params": {"norm": True}, "checkpoint": CheckpointPolicy(every_steps=3, keep=9)}
    whole = train(make_spec("whole", **changes))
    spec_file = make_spec("resumed", **changes)
    train(spec_file)
    kept = sorted((spec_file.parent / "checkpoints").glob("step-*"))
    for late in kept[2:]:  # as if it had been killed after step 6
        for file in late.iterdir():
            file.unlink()
        late.rmdir()
    (spec_file.parent / "output" / "result.json").unlink()
    resumed = train(spec_file)
    assert hashes(resumed) == hashes(whole)
    assert resumed.attempts == 2


def test_killed_while_finishing_it_finishes_again(make_spec: MakeSpec, read_lines: ReadLines) -> None:
    spec_file = make_spec()
    whole = train(spec_file)
    (spec_file.parent / "output" / "result.json").unlink()
    assert hashes(train(spec_file)) == hashes(whole)
    steps = [line["step"] for line in read_lines(spec_file) if "loss" in line]
    assert steps == sorted(steps), "no step was taken twice"


def test_changed_parameters_are_refused_by_name(make_spec: MakeSpec, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_spec())
    assert main(["--spec", str(make_spec(batch_size=16))]) == 2
    assert "config has changed" in capsys.readouterr().err


def test_no_good_checkpoint_is_a_stop_of_its_own(make_spec: MakeSpec, capsys: pytest.CaptureFixture[str]) -> None:
    spec_file = make_spec()
    train(spec_file)
    for manifest in spec_file.parent.glob("checkpoints/step-*/manifest.json"):
        manifest.write_bytes(manifest.read_bytes()[:-20])
    assert main(["--spec", str(spec_file)]) == 5
    assert "every checkpoint is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 1000}, "the training split has 96 samples"),
        ({"module": "/nowhere/mine.py"}, "/nowhere/mine.py does not exist"),
        ({"shards": 9, "accumulate": 2}, "need at least 18"),
    ],
)
def test_a_spec_that_cannot_be_trained(
    make_spec: MakeSpec, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], told: str
) -> None:
    assert main(["--spec", str(make_spec(**changes))]) == 2
    err = capsys.readouterr().err
    assert told in err and "Traceback" not in err


def test_a_bug_of_the_user_exits_1_with_its_traceback(make_spec: MakeSpec, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--spec", str(make_spec(params={"fail_at": 40}))]) == 1
    err = capsys.readouterr().err
    assert "tiny.py" in err and "RuntimeError: a bug in the data set" in err


def test_a_spec_file_that_is_no_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, told in (("{", "not JSON"), ("{}", "missing"), ('{"epoch": 3}', "unknown key 'epoch'")):
        (tmp_path / "spec.json").write_text(text)
        assert main(["--spec", str(tmp_path / "spec.json")]) == 2
        assert told in capsys.readouterr().err
    assert main(["--spec", str(tmp_path / "none.json")]) == 2


def test_sigterm_saves_the_running_step_and_loses_none(make_spec: MakeSpec, read_lines: ReadLines) -> None:
    spec_file = make_spec(params={"slow": 0.005}, epochs=20, checkpoint=CheckpointPolicy(every_steps=1000))
    command = [sys.executable, "-m", "training.train", "--spec", str(spec_file)]
    process = subprocess.Popen(command, env=os.environ | {"REPRISE_PROGRESS_EVERY": "0"})
    while not any("loss" in line for line in read_lines(spec_file)):
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    lines = read_lines(spec_file)
    last = max(line["step"] for line in lines if "loss" in line)
    saved = next(line for line in lines if line.get("event") == "saved")
    assert saved["step"] == last, "with notice no step is lost"
    assert 0 <= saved["seconds_after_notice"] < 5
    checkpointer = Checkpointer(f"file://{spec_file.parent}/checkpoints")
    assert checkpointer.store.names()[0].startswith(f"step-{last:010d}")
    checkpointer.close()


def test_starting_stays_light() -> None:
    """The compiler of torch (1.5 s) is not imported on the way to the first step."""
    program = "import sys, training.train; print('torch._dynamo' in sys.modules, 'torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.split() == ["False", "False"]
