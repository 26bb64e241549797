"""The newest step in a trainer's file, whatever stands around it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import training_progress
from flows.training_progress import TAIL_BYTES, newest_step


def step(number: int) -> str:
    return json.dumps({"step": number, "max_steps": 9, "epoch": 1, "loss": 0.5})


def test_no_file_and_no_step(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "progress.jsonl") is None
    (tmp_path / "progress.jsonl").write_text('{"event": "worker"}\n')
    assert newest_step(tmp_path / "progress.jsonl") is None


def test_events_and_a_half_written_line_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "progress.jsonl"
    file.write_text(f'{step(1)}\n{step(2)}\n{{"event": "saving", "step": 2}}\n{step(3)[:20]}')
    assert (newest_step(file) or {})["step"] == 2


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "progress.jsonl"
    file.write_text("\n".join(step(n) for n in range(5000)))
    assert file.stat().st_size > 10 * TAIL_BYTES
    assert (newest_step(file) or {})["step"] == 4999


def test_the_bar_of_a_training_that_is_done_ends_at_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[float, str]] = []

    async def show(run: Any, name: str, kind: str, data: float, description: str) -> None:
        assert (name, kind) == ("training", "progress")
        drawn.append((data, description))

    monkeypatch.setattr(training_progress, "show", show)
    monkeypatch.setattr(training_progress, "SECONDS", 0.01)
    row = {"status": "running"}
    run: Any = SimpleNamespace(
        store=SimpleNamespace(path=tmp_path),
        plan=SimpleNamespace(steps={"train_model": SimpleNamespace(key="k")}),
        step_row=lambda name: row,
    )
    (tmp_path / "trainings" / "k").mkdir(parents=True)

    async def train() -> None:
        async with training_progress.training_progress(run):
            (tmp_path / "trainings" / "k" / "progress.jsonl").write_text(step(8))
            while not drawn:
                await asyncio.sleep(0.01)
            row["status"] = "done"

    asyncio.run(train())
    # The file counts epochs from 0, people and the trainer's log from 1.
    assert drawn[0] == (100.0 * 8 / 9, "step 8 of 9, epoch 2, loss 0.5")
    assert drawn[-1] == (100.0, "step 9 of 9, epoch 2, loss 0.5")
