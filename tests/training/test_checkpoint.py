"""Checkpoints of one process on files: what goes in comes out, and what cannot be is told."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from training.checkpoint import (
    Checkpointer,
    CheckpointWriteError,
    IdentityMismatch,
    NoGoodCheckpoint,
    StateMismatch,
    newest_complete,
    p95,
    verify,
)


class Net(torch.nn.Module):
    """Tied weights, running statistics, a buffer that is not saved, half precision beside single."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(20, width)
        self.norm = torch.nn.BatchNorm1d(width)
        self.low = torch.nn.Parameter(torch.randn(3, 5).to(torch.bfloat16))
        self.head = torch.nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(tokens))) + self.low.float().sum()


def make(seed: int = 0, width: int = 12) -> dict[str, Any]:
    torch.manual_seed(seed)
    net = Net(width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 50)
    return {"model": net, "optimizer": optimizer, "scheduler": scheduler, "seen": {"samples": 0}}


def advance(state: dict[str, Any], checkpointer: Checkpointer | None = None) -> None:
    tokens = torch.randint(0, 20, (16,))
    torch.nn.functional.cross_entropy(state["model"](tokens), tokens).backward()
    if checkpointer is not None:
        checkpointer.wait_staged()
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    state["scheduler"].step()
    state["seen"]["samples"] += 16


def facts(state: dict[str, Any]) -> dict[str, Any]:
    """Everything that must be equal, copied."""
    optimizer = state["optimizer"].state_dict()
    found: dict[str, Any] = {k: v.clone() for k, v in state["model"].state_dict().items()}
    found |= {f"{i}.{k}": torch.as_tensor(v).clone() for i, s in optimizer["state"].items() for k, v in s.items()}
    return found | {
        "groups": [dict(group) for group in optimizer["param_groups"]],
        "scheduler": dict(state["scheduler"].state_dict()),
        "seen": dict(state["seen"]),
    }


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[key].dtype and torch.equal(value, right[key]), key
        else:
            assert value == right[key], key


def streams() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    state = make()
    with pytest.raises(AssertionError):
        assert_same(facts(make(1)), facts(state))  # the comparison can fail
    checkpointer = Checkpointer(str(tmp_path), identity={"code": "a1"})
    assert checkpointer.load(state) is None
    for _ in range(3):
        advance(state)
    own = {**streams(), "position": (3, [1, 2]), "raw": b"\x00\xff", "count": np.int64(7)}
    checkpointer.save(3, state, meta={"epoch": 1, "loss": 0.5}, per_rank=own)
    saved = facts(state)
    for _ in range(4):
        advance(state, checkpointer)
    checkpointer.close()
    straight = facts(state)

    other = make(seed=5)
    info = Checkpointer(f"file://{tmp_path}", identity={"code": "a1"}).load(other)
    assert info is not None and (info.step, info.world, info.complete, info.skipped) == (3, 1, False, ())
    assert info.meta == {"epoch": 1, "loss": 0.5}
    assert_same(facts(other), saved)
    assert other["model"].head.weight is other["model"].embed.weight
    assert info.mine["position"] == (3, [1, 2]) and type(info.mine["position"]) is tuple
    assert info.mine["raw"] == b"\x00\xff" and info.mine["count"] == np.int64(7)
    random.setstate(info.mine["python"])
    np.random.set_state(info.mine["numpy"])
    torch.set_rng_state(info.mine["torch"])
    for _ in range(4):
        advance(other)
    assert_same(facts(other), straight)


def test_what_is_copied_is_the_moment_of_the_save(tmp_path: Path) -> None:
    """Running statistics change in forward, before wait_staged: they must not leak into the checkpoint."""
    state = make()
    advance(state)
    checkpointer = Checkpointer(str(tmp_path))
    saved = facts(state)
    checkpointer.save(1, state, meta={}, per_rank={})
    for _ in range(5):
        state["model"](torch.randint(0, 20, (16,)))
    state["seen"]["samples"] = -1
    checkpointer.wait_durable()
    assert not torch.equal(saved["norm.running_mean"], state["model"].norm.running_mean)
    other = make(1)
    assert checkpointer.load(other) is not None
    assert_same(facts(other), saved)
    checkpointer.close()


def test_any_tool_reads_the_tensors_and_a_person_the_manifest(tmp_path: Path) -> None:
    state = make()
    advance(state)
    checkpointer = Checkpointer(str(tmp_path), identity={"data": "d" * 40})
    checkpointer.save(12, state, meta={"epoch": 2}, per_rank={}, complete=True)
    info = checkpointer.wait_durable()
    checkpointer.close()
    assert info is not None
    folder = tmp_path / info.name
    with safe_open(folder / "rank-00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model.embed.weight"), state["model"].embed.weight)
        assert "model.head.weight" not in file.keys()  # noqa: SIM118 - not a dict
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 12 and manifest["complete"] is True and manifest["meta"] == {"epoch": 2}
    assert manifest["identity"] == {"data": "d" * 40}
    complete = newest_complete(str(tmp_path))
    assert complete is not None and complete.step == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == [".writing", info.name] and not any(
        (tmp_path / ".writing").iterdir()
    )


def test_completion_is_asked_of_the_manifest_only(tmp_path: Path) -> None:
    assert newest_complete(str(tmp_path / "nothing")) is None
    state = make()
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(1, state, meta={}, per_rank={}, complete=True)
    checkpointer.wait_durable()
    checkpointer.close()
    found = next(tmp_path.glob("step-*/rank-00000.safetensors"))
    found.write_bytes(found.read_bytes()[:-1])
    assert newest_complete(str(tmp_path)) is None


def test_only_the_newest_are_kept_and_the_same_step_twice_overwrites_nothing(tmp_path: Path) -> None:
    state = make()
    checkpointer = Checkpointer(str(tmp_path), keep=3)
    for step in (1, 2, 3, 4, 4):
        state["seen"]["samples"] += 1
        checkpointer.save(step, state, meta={}, per_rank={})
        checkpointer.wait_durable()
    assert len(checkpointer.durable_seconds) == len(checkpointer.stall_seconds) == 5
    checkpointer.close()
    assert [audit.step for audit in verify(str(tmp_path))] == [4, 4, 3]
    other = make()
    Checkpointer(str(tmp_path)).load(other)
    assert other["seen"]["samples"] == 5


def test_what_cannot_be_pruned_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(str(tmp_path))

    def refuse(name: str) -> None:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(checkpointer.store, "remove", refuse)
    for step in (1, 2, 3):
        checkpointer.save(step, make(), meta={}, per_rank={})
        checkpointer.wait_durable()
    assert "could not be removed" in caplog.text and len(verify(str(tmp_path))) == 3
    monkeypatch.undo()
    checkpointer.save(4, make(), meta={}, per_rank={})
    checkpointer.close()
    assert [audit.step for audit in verify(str(tmp_path))] == [4, 3]


def test_saves_follow_each_other_without_a_wait_between(tmp_path: Path) -> None:
    state = make()
    checkpointer = Checkpointer(str(tmp_path))
    for step in range(1, 30):
        checkpointer.save(step, state, meta={}, per_rank={}, blocking=step % 2 == 0)
        advance(state, checkpointer)
    info = checkpointer.wait_durable()
    checkpointer.close()
    assert info is not None and info.step == 29 and len(verify(str(tmp_path))) == 2
    assert not checkpointer.busy


def test_a_failure_is_told_although_later_saves_went_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make()
    checkpointer = Checkpointer(str(tmp_path))

    def broken(name: str, file: str, nbytes: int) -> Any:
        raise CheckpointWriteError("no room today")

    monkeypatch.setattr(checkpointer.store, "create", broken)
    checkpointer.save(1, state, meta={}, per_rank={})
    while checkpointer.busy:
        pass
    monkeypatch.undo()
    with pytest.raises(CheckpointWriteError, match="no room today"):
        checkpointer.save(2, state, meta={}, per_rank={})
    assert checkpointer.wait_durable() is None
    checkpointer.save(2, state, meta={}, per_rank={})
    info = checkpointer.wait_durable()
    assert info is not None and info.step == 2
    checkpointer.close()


def test_another_identity_names_what_changed(tmp_path: Path) -> None:
    state = make()
    checkpointer = Checkpointer(str(tmp_path), identity={"code": "old", "data": "same"})
    checkpointer.save(1, state, meta={}, per_rank={})
    checkpointer.close()
    with pytest.raises(IdentityMismatch, match=r"code has changed.*'old'.*'new'"):
        Checkpointer(str(tmp_path), identity={"code": "new", "data": "same"}).load(make())
    assert verify(str(tmp_path))[0].error == ""  # refused is not damaged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(make(width=14)), r"model.embed.weight: \[20, 12\] in the checkpoint, \[20, 14\]"),
        (lambda s: s["model"].add_module("more", torch.nn.Linear(1, 1)), "model.more.weight is in the model and not"),
        (lambda s: s.pop("scheduler"), r"state\['scheduler'\] exists only in the checkpoint"),
        (lambda s: s["model"].__delattr__("norm"), "model.norm.* is in the checkpoint and not in the model"),
        (lambda s: s["optimizer"].add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]}), "parameter groups"),
    ],
)
def test_another_model_is_refused_and_nothing_is_quarantined(tmp_path: Path, change: Any, message: str) -> None:
    state = make()
    advance(state)
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(1, state, meta={}, per_rank={})
    checkpointer.close()
    other = make()
    change(other)
    with pytest.raises(StateMismatch, match=message):
        Checkpointer(str(tmp_path)).load(other)
    assert not (tmp_path / "quarantine").exists()


def test_all_damaged_is_a_stop_also_the_next_time(tmp_path: Path) -> None:
    state = make()
    checkpointer = Checkpointer(str(tmp_path))
    for step in (1, 2):
        checkpointer.save(step, state, meta={}, per_rank={})
        checkpointer.wait_durable()
    checkpointer.close()
    for file in tmp_path.glob("step-*/manifest.json"):
        file.write_bytes(b"{}")
    for _ in range(2):
        with pytest.raises(NoGoodCheckpoint, match="every checkpoint is damaged"):
            Checkpointer(str(tmp_path)).load(make())
    assert len(list((tmp_path / "quarantine").glob("step-*/reason.txt"))) == 2


def test_what_cannot_be_stored_without_pickle_is_named(tmp_path: Path) -> None:
    class Custom:
        pass

    checkpointer = Checkpointer(str(tmp_path))
    with pytest.raises(TypeError, match=r"per_rank.sampler\[0\].*Custom"):
        checkpointer.save(1, make(), meta={}, per_rank={"sampler": [Custom()]})
    with pytest.raises(TypeError, match=r"state\['loss'\]: int has no state_dict"):
        checkpointer.save(1, {"loss": 3}, meta={}, per_rank={})
    with pytest.raises(TypeError, match="JSON"):
        checkpointer.save(1, make(), meta={"x": torch.ones(1)}, per_rank={})
    checkpointer.save(1, make(), meta={}, per_rank={})  # and it goes on working
    checkpointer.close()
    assert len(verify(str(tmp_path))) == 1


def test_arguments_that_cannot_be_right(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=1"):
        Checkpointer(str(tmp_path), keep=1)
    with pytest.raises(ValueError, match="rank=2 of world=2"):
        Checkpointer(str(tmp_path), rank=2, world=2)


FULL_DISK = """
import resource, sys, torch
from training.checkpoint import Checkpointer, CheckpointWriteError, verify
model = torch.nn.Linear(300, 300)
checkpointer = Checkpointer(sys.argv[1])
checkpointer.save(1, {"model": model}, meta={}, per_rank={})
checkpointer.wait_durable()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for step, wait in ((2, checkpointer.wait_durable), (3, None)):
    checkpointer.save(step, {"model": model}, meta={}, per_rank={})
    try:
        if wait is None:
            while checkpointer.busy:
                pass
            checkpointer.save(4, {"model": model}, meta={}, per_rank={})
        else:
            wait()
    except CheckpointWriteError as error:
        print(error)
    else:
        sys.exit("no error")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpointer.save(5, {"model": model}, meta={}, per_rank={})
checkpointer.close()
assert [(a.step, a.error) for a in verify(sys.argv[1])] == [(5, ""), (1, "")]
"""


def test_a_full_disk_leaves_the_old_one_and_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    for told in (first, second):
        assert str(tmp_path) in told and "bytes needed" in told and "bytes free" in told and "earlier" in told
    assert list((tmp_path / ".writing").iterdir()) == []


def test_no_space_when_the_manifest_is_written_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make()
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(1, state, meta={}, per_rank={})
    checkpointer.wait_durable()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer.save(2, state, meta={"note": "x" * 2_000_000}, per_rank={})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(CheckpointWriteError, match=r"manifest.json"):
            checkpointer.wait_durable()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpointer.close()
    assert [audit.step for audit in verify(str(tmp_path))] == [1]
    assert list((tmp_path / ".writing").iterdir()) == []


def test_an_unreachable_store_damages_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(1, make(), meta={}, per_rank={})
    checkpointer.wait_durable()

    def refused(name: str, file: str) -> bytes:
        raise PermissionError(13, "Permission denied", file)

    monkeypatch.setattr(checkpointer.store, "read", refused)
    with pytest.raises(PermissionError):
        checkpointer.load(make())
    monkeypatch.undo()
    assert checkpointer.load(make()) is not None
    checkpointer.close()


def test_the_program_lists_what_is_there(tmp_path: Path) -> None:
    checkpointer = Checkpointer(str(tmp_path))
    for step in (7, 8):
        checkpointer.save(step, make(), meta={}, per_rank={}, complete=step == 8)
        checkpointer.wait_durable()
    checkpointer.close()
    command = [sys.executable, "-m", "training.checkpoint_audit", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3 and "yes" in lines[1] and "sound" in lines[1], done.stderr
    file = next(tmp_path.glob("step-0000000008-*/rank-00000.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=False)
    found = json.loads(done.stdout)
    assert done.returncode == 5 and "sha256" in found[0]["error"] and not found[1]["error"]
    assert (
        "torch"
        not in subprocess.run(
            [sys.executable, "-c", "import training.checkpoint_audit, sys; print(*sys.modules)"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.split()
    ), "whoever asks whether training is complete must not need torch"


def test_p95() -> None:
    assert p95([3.0]) == 3.0
    assert p95([float(i) for i in range(1, 101)]) == 95.0
    assert np.isnan(p95([]))
