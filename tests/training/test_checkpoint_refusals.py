"""What must not be loaded or stored is refused by name, and nothing is harmed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.checkpoint_state import advance, make
from training.checkpoint import Checkpointer, IdentityMismatch, NoGoodCheckpoint, StateMismatch, verify


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
