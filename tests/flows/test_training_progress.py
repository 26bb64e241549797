"""The newest step in a trainer's file, whatever stands around it."""

from __future__ import annotations

import json
from pathlib import Path

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
