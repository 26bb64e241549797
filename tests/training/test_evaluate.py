"""Evaluation of another version's weights on the same data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from training.evaluate import main
from training.train import main as train

MakeSpec = Callable[..., Path]


def test_the_program_gives_what_the_trainer_gave(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec_file = make_spec()
    assert train(["--spec", str(spec_file)]) == 0
    output = spec_file.parent / "output"
    arguments = [
        "--spec",
        str(spec_file),
        "--weights",
        str(output / "model.safetensors"),
        "--output",
        str(tmp_path / "x"),
    ]
    assert main(arguments) == 0
    for name in ("metrics.json", "heldout.jsonl"):
        assert (tmp_path / "x" / name).read_bytes() == (output / name).read_bytes()
    row = json.loads((output / "heldout.jsonl").read_text().splitlines()[0])
    assert set(row["answer"]) == {"label", "scores"}


def test_weights_of_another_model_are_refused(make_spec: MakeSpec, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--spec", str(make_spec())]) == 0
    other = make_spec("other", params={"width": 9})
    weights = other.parent.parent / "training" / "output" / "model.safetensors"
    assert main(["--spec", str(other), "--weights", str(weights), "--output", str(other.parent / "x")]) == 2
    assert "does not fit the model" in capsys.readouterr().err


def test_missing_weights(make_spec: MakeSpec, capsys: pytest.CaptureFixture[str]) -> None:
    spec_file = make_spec()
    assert main(["--spec", str(spec_file), "--weights", "/nowhere.safetensors", "--output", str(spec_file.parent)]) == 2
    assert "/nowhere.safetensors" in capsys.readouterr().err
