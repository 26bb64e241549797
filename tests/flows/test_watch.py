"""What a run says while it happens, on a pipe: a line per step and per interruption, progress only now and then."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flows.watch import Watch


def step(status: str, **more: Any) -> dict[str, Any]:
    return {"name": "pull_data", "status": status, "reason": "first time", "seconds": 2.5, **more}


def attempt(**more: Any) -> dict[str, Any]:
    return {
        "number": 1, "cause": "spot", "reached_step": 30, "to_step": 25, "steps_lost": 5, "ended": 2.0,
        "notice_to_saved": None, "reason": "taken", **more,
    }  # fmt: skip


def test_a_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch()
    watch("step", step("running"))
    watch("step", step("done"))
    watch("step", step("reused", reason="unchanged: data abc"))
    assert capsys.readouterr().out == "✓ pull_data       2.5 s\n↺ pull_data       unchanged: data abc\n"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (attempt(), "⚡ attempt 1: spot at step 30, 5 steps lost; resuming from step 25"),
        (attempt(notice_to_saved=0.04, steps_lost=0), "0 steps lost, saved 0.04 s after the notice; resuming"),
        (attempt(cause="cancelled"), "cancelled at step 30, 5 steps lost; its checkpoint stands at step 25"),
        (attempt(cause="user_error", reason="exit 1: KeyError"), "✗ attempt 1: exit 1: KeyError"),
    ],
)
def test_a_line_per_attempt_that_ended_early(
    row: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watch()
    watch("attempts", {"attempts": [row]})
    watch("attempts", {"attempts": [row, attempt(number=2, ended=None)]})
    watch("attempts", {"attempts": [row, attempt(number=2, cause="complete")]})
    out = capsys.readouterr().out
    assert line in out
    assert len(out.splitlines()) == 1


def test_attempts_of_an_earlier_flow_are_not_told_again(capsys: pytest.CaptureFixture[str]) -> None:
    Watch(attempts=1)("attempts", {"attempts": [attempt()]})
    assert capsys.readouterr().out == ""


def test_progress_is_told_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch()
    for number in range(100):
        line = json.dumps({"step": number, "max_steps": 540, "epoch": 2, "loss": 0.5})
        watch("line", {"step": "train_model", "line": line})
    watch("line", {"step": "train_model", "line": "{half a line"})
    watch("line", {"step": "pull_data", "line": "pull_data: 512/1797 files"})
    watch("line", {"step": "pull_data", "line": "some other log line"})
    assert capsys.readouterr().out == "  train_model step 0/540  epoch 3  loss 0.5000\n  pull_data 512/1797 files\n"


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(quiet=True)
    watch("step", step("done"))
    watch.close()
    assert capsys.readouterr().out == ""
