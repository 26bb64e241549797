"""Checkpoints under kill -9 and under flipped bits: nothing unreadable, nothing mixed, always the newest committed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from training.checkpoint import Checkpointer, NoGoodCheckpoint, verify

# A process that has imported everything and forks for each try: a kill costs milliseconds, not an import of torch.
# Every tensor of step n holds n and so do the Python values: a mixture of two steps cannot go unseen.
ZYGOTE = """
import os, signal, sys, torch
from training import checkpoint_audit, checkpoint_load, checkpoint_plan, checkpoint_store
from training.checkpoint import Checkpointer

def say(*words):
    WRITE(1, (" ".join(map(str, words)) + chr(10)).encode())

WRITE = os.write
tensors = {f"t{i}": torch.zeros(size) for i, size in enumerate((300_000, 7, 50_000, 1))}
state = {"tensors": tensors, "python": {"step": 0}}

def save(checkpointer, step):
    checkpointer.wait_staged()
    for tensor in state["tensors"].values():
        tensor.fill_(step)
    state["python"]["step"] = step
    checkpointer.save(step, state, meta={"step": step}, per_rank={"step": step})
    return checkpointer.wait_durable().step

def forever(folder):
    checkpointer = Checkpointer(folder)
    info = checkpointer.load(state)
    step = info.step if info else 0
    say("ready", step)
    while True:
        step += 1
        say("committed", save(checkpointer, step))

def die_at(folder, at):
    count = 0
    def deadly(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in ("open", "write", "fsync", "rename", "close", "unlink", "rmdir", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))
    checkpointer = Checkpointer(folder)
    for step in (3, 4):
        save(checkpointer, step)
    say("calls", count)

torch.set_num_threads(1)
for line in sys.stdin:
    mode, folder, at = line.split()
    if (child := os.fork()) == 0:
        forever(folder) if mode == "forever" else die_at(folder, int(at))
        os._exit(0)
    say("child", child)
    _, status = os.waitpid(child, 0)
    say("ended", os.waitstatus_to_exitcode(status))
"""


class Zygote:
    """Tries of the save protocol, each in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def begin(self, mode: str, folder: Path, at: int = 0) -> None:
        assert self._process.stdin is not None
        print(mode, folder, at, file=self._process.stdin, flush=True)

    def words(self) -> tuple[str, int]:
        assert self._process.stdout is not None
        word, value = self._process.stdout.readline().split()
        return word, int(value)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


def kill_at_random_points(zygote: Zygote, folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    committed = 0
    for _ in range(kills):
        zygote.begin("forever", folder)
        child = resumed = None
        saves, before = rng.randrange(3), committed
        while child is None or resumed is None or saves > 0:  # "child" and "ready" come in any order
            word, value = zygote.words()
            assert word != "ended", f"the saver failed by itself: exit {value}"
            child = value if word == "child" else child
            resumed = value if word == "ready" else resumed
            if word == "committed":
                saves, committed = saves - 1, max(committed, value)
        assert resumed >= before, "an older step was resumed than was committed"
        committed = max(committed, resumed)  # the last kill may have fallen before the announcement of its commit
        time.sleep(rng.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        while (found := zygote.words())[0] != "ended":
            committed = max(committed, found[1])
        assert found == ("ended", -signal.SIGKILL)
        check(folder, committed)


def check(folder: Path, committed: int) -> None:
    audits = verify(str(folder))
    assert all(audit.error == "" for audit in audits)
    state = {"tensors": {f"t{i}": torch.empty(n) for i, n in enumerate((300_000, 7, 50_000, 1))}, "python": {}}
    checkpointer = Checkpointer(str(folder))
    info = checkpointer.load(state)
    checkpointer.close()
    if info is None:
        assert committed == 0
        return
    # The kill may fall between the commit and its announcement: then the newest is one further.
    assert info.step in (committed, committed + 1) and info.skipped == ()
    assert state["python"] == {"step": info.step} and info.mine == {"step": info.step} == info.meta
    assert all(bool((tensor == info.step).all()) for tensor in state["tensors"].values())


def test_kill_at_random_points_of_the_protocol(tmp_path: Path, zygote: Zygote) -> None:
    kill_at_random_points(zygote, tmp_path, kills=20, seed=1)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_kill_at_200_random_points_of_the_protocol(tmp_path: Path, zygote: Zygote) -> None:
    kill_at_random_points(zygote, tmp_path, kills=200, seed=2)


def prepared(folder: Path) -> None:
    """Two checkpoints, so that the next save also prunes."""
    state = {"tensors": {f"t{i}": torch.zeros(n) for i, n in enumerate((300_000, 7, 50_000, 1))}, "python": {}}
    checkpointer = Checkpointer(str(folder))
    for step in (1, 2):
        for tensor in state["tensors"].values():
            tensor.fill_(step)
        state["python"]["step"] = step
        checkpointer.save(step, state, meta={"step": step}, per_rank={"step": step})
        checkpointer.wait_durable()
    checkpointer.close()


def sweep_of_kills(zygote: Zygote, tmp_path: Path, stride: int) -> None:
    """Without luck: the process kills itself at its n-th system call, for every n."""
    prepared(tmp_path / "whole")
    zygote.begin("die_at", tmp_path / "whole", 0)
    found = dict(zygote.words() for _ in range(3))
    assert found["ended"] == 0 and found["calls"] > 30
    for at in range(1, found["calls"] + 1, stride):
        folder = tmp_path / f"at{at}"
        prepared(folder)
        zygote.begin("die_at", folder, at)
        assert dict(zygote.words() for _ in range(2))["ended"] == -signal.SIGKILL
        audits = verify(str(folder))
        assert all(audit.error == "" for audit in audits) and len(audits) >= 2
        assert audits[0].step in (2, 3, 4)
        check(folder, audits[0].step)
        shutil.rmtree(folder)


def test_kill_at_some_system_calls(tmp_path: Path, zygote: Zygote) -> None:
    sweep_of_kills(zygote, tmp_path, stride=7)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_kill_at_every_system_call(tmp_path: Path, zygote: Zygote) -> None:
    sweep_of_kills(zygote, tmp_path, stride=1)


def model_state(value: float) -> dict[str, torch.nn.Module | torch.optim.Optimizer]:
    model = torch.nn.Linear(9, 5)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.ones(1, 9)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return {"model": model, "optimizer": optimizer}


def test_200_flips_and_truncations_are_all_detected(tmp_path: Path) -> None:
    rng = random.Random(3)
    good = tmp_path / "good"
    checkpointer = Checkpointer(str(good))
    for step in (1, 2):
        checkpointer.save(step, model_state(step), meta={"step": step}, per_rank={"x": [step] * 5})
        checkpointer.wait_durable()
    checkpointer.close()
    newest = verify(str(good))[0].name
    for number in range(200):
        folder = tmp_path / "damaged"
        shutil.copytree(good, folder)
        file = folder / newest / rng.choice(["manifest.json", "rank-00000.safetensors"])
        raw = bytearray(file.read_bytes())
        what = rng.choice(["flip", "flip", "truncate", "remove"])
        if what == "flip":
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            file.write_bytes(raw)
        elif what == "truncate":
            file.write_bytes(raw[: rng.randrange(len(raw))])
        else:
            file.unlink()
        state = model_state(7.0)
        loader = Checkpointer(str(folder))
        info = loader.load(state)
        assert info is not None and info.step == 1, f"damage {number} ({what} in {file.name}) went unseen"
        assert [skipped.name for skipped in info.skipped] == [newest] and info.skipped[0].reason
        assert (folder / "quarantine" / newest / "reason.txt").read_text().strip() == info.skipped[0].reason
        assert bool((state["model"].weight == 1.0).all())
        shutil.rmtree(folder)


def test_every_damaged_is_a_stop_and_changes_no_weight(tmp_path: Path) -> None:
    checkpointer = Checkpointer(str(tmp_path))
    for step in (1, 2):
        checkpointer.save(step, model_state(step), meta={}, per_rank={})
        checkpointer.wait_durable()
    checkpointer.close()
    for file in tmp_path.glob("step-*/rank-00000.safetensors"):
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 4
        file.write_bytes(raw)
    state = model_state(7.0)
    with pytest.raises(NoGoodCheckpoint):
        Checkpointer(str(tmp_path)).load(state)
    assert bool((state["model"].weight == 7.0).all())


def test_leftovers_of_a_dead_attempt_are_swept(tmp_path: Path) -> None:
    prepared(tmp_path)
    for left in (".writing/step-0000000009-dead-0001", ".trash/step-0000000001-dead-0001"):
        (tmp_path / left).mkdir(parents=True)
        (tmp_path / left / "rank-00000.safetensors").write_bytes(b"half")
    check(tmp_path, 2)
    assert not any((tmp_path / ".writing").iterdir()) and not any((tmp_path / ".trash").iterdir())
