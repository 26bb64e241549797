"""Which parts of a model FSDP2 gathers one by one, and that models of every shape train and resume with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from training.sharded import blocks_of
from training.spec import CheckpointPolicy
from training.verify_resume import main

MakeSpec = Callable[..., Path]
TOKENS = Path(__file__).parent / "modules" / "tokens.py"


class Block(nn.Module):
    """As most are written: a sequence inside of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Model(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(8, 4), body, nn.Linear(4, 8)


def names(model: nn.Module) -> list[str]:
    named = {module: name for name, module in model.named_modules()}
    return [named[block] for block in blocks_of(model)]


def test_a_block_is_one_part_with_its_own_sequences() -> None:
    assert names(Model(nn.ModuleList([Block(), Block()]))) == ["body.0", "body.1"]


def test_lists_in_lists_are_opened_and_what_has_no_parameter_is_none() -> None:
    stages = nn.ModuleList([nn.Sequential(Block(), nn.GELU()), nn.Sequential(Block(), Block())])
    assert names(Model(stages)) == ["body.0.0", "body.1.0", "body.1.1"]
    assert names(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))) == ["0", "2"]


def test_a_model_without_lists_is_one_part() -> None:
    assert names(Model(nn.Linear(4, 4))) == []


def test_a_block_used_twice_is_one_part() -> None:
    block = Block()
    assert names(Model(nn.ModuleList([block, block]))) == ["body.0"]


def test_a_parameter_of_two_modules_stays_with_the_model() -> None:
    model = Model(nn.ModuleList([Block(), nn.Linear(4, 8, bias=False)]))
    body = model.body
    assert isinstance(body, nn.ModuleList)
    assert names(model) == ["body.0", "body.1"]
    model.embed.weight = body[1].weight  # tied, as a language model's
    assert names(model) == ["body.0"]
    both = nn.ModuleList([Block(), Block()])
    both[0].mlp[0].weight = both[1].mlp[0].weight  # type: ignore[union-attr,index]
    assert names(Model(both)) == []


def test_a_block_of_a_list_and_of_another_block_belongs_to_that() -> None:
    inner, outer = Block(), Block()
    outer.extra = inner
    assert names(Model(nn.ModuleList([inner, outer]))) == ["body.1"]


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_transformer_resumes_to_the_bit(make_spec: MakeSpec, tmp_path: Path, tied: bool) -> None:
    spec = make_spec(
        module=str(TOKENS),
        parallel="fsdp",
        params={"samples": 96, "tied": tied},
        batch_size=16,
        epochs=3,
        checkpoint=CheckpointPolicy(every_steps=4),
    )
    output = tmp_path / "certificate.json"
    assert main(["--spec", str(spec), "--processes", "2", "--kills", "2", "--output", str(output)]) == 0
    certificate = json.loads(output.read_text())
    assert certificate["equal"] and certificate["kills"] == 2
