"""Checkpoints of one process on files: what goes in comes out."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.training.checkpoint_state import advance, assert_same, facts, make
from training.checkpoint import Checkpointer, newest_complete, p95, verify


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


def halve(state: dict[str, Any]) -> None:
    state["model"].norm.half()


def cut(state: dict[str, Any]) -> None:
    state["model"].low.data = state["model"].low.data[:2]


def turn(state: dict[str, Any]) -> None:
    state["model"].low.data = state["model"].low.data.t()


@pytest.mark.parametrize("change", [halve, cut, turn])
@pytest.mark.parametrize("blocking", [False, True])
def test_parameters_that_take_another_shape_in_place_are_saved_as_they_are(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], blocking: bool
) -> None:
    """The same tensor objects as in the save before: only the copying thread sees that the plan does not fit."""
    state = make()
    advance(state)
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(1, state, meta={}, per_rank={})
    checkpointer.wait_durable()
    change(state)
    checkpointer.save(2, state, meta={"note": 7}, per_rank={"own": 1}, blocking=blocking)
    saved = facts(state)
    state["model"].norm.running_mean += 1  # as forward does, before the optimizer's turn
    info = checkpointer.wait_durable()
    assert info is not None and (info.step, info.meta, info.mine) == (2, {"note": 7}, {"own": 1})
    other = make(1)
    change(other)
    found = checkpointer.load(other)
    assert found is not None and found.step == 2 and not found.skipped
    assert_same(facts(other), saved)
    checkpointer.save(3, other, meta={}, per_rank={})
    checkpointer.close()
    assert [(audit.step, audit.error) for audit in verify(str(tmp_path))] == [(3, ""), (2, "")]
    assert list((tmp_path / ".writing").iterdir()) == []


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


def test_p95() -> None:
    assert p95([3.0]) == 3.0
    assert p95([float(i) for i in range(1, 101)]) == 95.0
    assert np.isnan(p95([]))
