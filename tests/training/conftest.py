"""A tiny training for the tests of the loop and of what is round it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.spec import CheckpointPolicy, TrainSpec

MODULE = Path(__file__).parent / "modules" / "tiny.py"


@pytest.fixture
def make_spec(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes spec.json of a tiny training into a folder of that name and returns its path."""

    def make(name: str = "training", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        settings: dict[str, Any] = {
            "key": "k" * 40,
            "pipeline": "tiny",
            "module": str(MODULE),
            "data": str(folder),
            "checkpoints": f"file://{folder}/checkpoints",
            "output": str(folder / "output"),
            "progress": str(folder / "progress.jsonl"),
            "epochs": 2,
            "batch_size": 12,
            "checkpoint": CheckpointPolicy(every_steps=5),
        }
        (folder / "spec.json").write_text(TrainSpec(**(settings | changes)).to_json())
        return folder / "spec.json"

    return make


@pytest.fixture
def read_lines() -> Callable[[Path], list[dict[str, Any]]]:
    """A function that reads the progress lines beside a spec file."""

    def read(spec_file: Path) -> list[dict[str, Any]]:
        path = spec_file.parent / "progress.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return read
