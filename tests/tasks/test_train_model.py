"""The loop over attempts, on a runner that follows a script: budgets, ledger, adoption, completion."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import GiveUp
from deployments.workload import Cause, Outcome, Workload
from tasks.records import Attempt, Store
from tasks.train_model import Cancelled, TrainRequest, progress_of, train_model
from training.spec import EXIT_NO_GOOD_CHECKPOINT, TrainSpec


class Script:
    """A runner whose attempts end as written; what the trainer would have left on disk is written too."""

    place = "script"

    def __init__(self, ends: list[tuple[Cause, int, int, int]]) -> None:
        self.ends, self.seen = iter(ends), list[Workload]()

    def run(self, workload: Workload, *, on_line: Callable[[str], None] | None = None) -> Outcome:
        self.seen.append(workload)
        cause, code, saved, reached = next(self.ends)
        spec, now = workload.request, time.time()
        lines = [
            {"event": "checkpoint", "step": saved, "time": now + 1},
            {"step": reached, "max_steps": 40, "epoch": 0, "loss": 0.5, "time": now + 2},
        ]
        if cause == "spot" and code == 143:
            lines.append({"event": "saved", "step": saved, "time": now + 3.5})
        with Path(spec["progress"]).open("a") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)
            out.write('{"step": 9')  # cut by the kill
            out.write("\n")
        if cause == "complete" and code == 0 and reached == 40:
            result = {
                "key": spec["key"], "step": 40, "max_steps": 40, "epoch": 2, "samples_seen": 400,
                "metrics": {"accuracy": 1.0},
                "weights": "w", "weights_sha256": "s", "heldout": "h", "parameters": 3, "seconds": 1.0,
            }  # fmt: skip
            Path(spec["output"], "result.json").write_text(json.dumps(result))
        notice = now + 3.0 if code == 143 else None
        return Outcome(
            name=workload.name,
            exit_code=code,
            cause=cause,
            reason=f"ended by {cause}",
            started=now,
            ended=now + 4,
            notice=notice,
        )

    def stop(self, name: str, *, grace_seconds: float | None = None) -> None:
        raise AssertionError("nothing stops it here")

    def logs(self, name: str, *, follow: bool = False) -> Iterator[str]:
        yield from ()


@pytest.fixture
def request_(tmp_path: Path) -> TrainRequest:
    spec = TrainSpec(
        key="k" * 40, pipeline="digits", module="m.py", data="d", checkpoints=f"file://{tmp_path}/c",
        output=str(tmp_path / "out"), progress=str(tmp_path / "progress.jsonl"),
    )  # fmt: skip
    return TrainRequest(spec=spec, experiment="digits", interruptions=2, errors=1)


def drive(request: TrainRequest, script: Script, tmp_path: Path) -> tuple[Any, Store]:
    store = Store(root=str(tmp_path / "store"))
    return train_model(request, runner=script, store=store), store


def test_it_goes_on_through_interruptions_and_keeps_the_ledger(request_: TrainRequest, tmp_path: Path) -> None:
    script = Script([("spot", 143, 12, 12), ("spot", 137, 20, 27), ("complete", 0, 40, 40)])
    trained, store = drive(request_, script, tmp_path)
    assert (trained.attempts, trained.interruptions, trained.steps_lost, trained.steps) == (3, 2, 7, 40)
    rows = store.attempts("k" * 40)
    assert [(a.cause, a.from_step, a.to_step, a.reached_step) for a in rows] == [
        ("spot", 0, 12, 12), ("spot", 12, 20, 27), ("complete", 20, 40, 40),
    ]  # fmt: skip
    assert [a.notice_to_saved for a in rows] == [pytest.approx(0.5, abs=0.01), None, None]
    assert [w.name for w in script.seen] == [f"train-{'k' * 12}-{n}" for n in (1, 2, 3)]


def test_exit_zero_without_a_complete_training_is_not_done(request_: TrainRequest, tmp_path: Path) -> None:
    script = Script([("complete", 0, 20, 20), ("complete", 0, 40, 40)])
    trained, _ = drive(request_, script, tmp_path)
    assert trained.attempts == 2


def test_an_interruption_never_spends_the_error_budget(request_: TrainRequest, tmp_path: Path) -> None:
    script = Script([("user_error", 1, 0, 3), ("spot", 137, 5, 9), ("spot", 137, 12, 20), ("complete", 0, 40, 40)])
    trained, _ = drive(request_, script, tmp_path)
    assert trained.interruptions == 2


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([("spot", 137, 1, 1)] * 3, r"interrupted 3 times, budget \[train\] interruptions = 2"),
        ([("user_error", 1, 0, 0)] * 2, r"failed 2 times, budget \[train\] errors = 1; last: ended by user_error"),
        ([("user_error", EXIT_NO_GOOD_CHECKPOINT, 0, 0)], "ended by user_error"),
    ],
)
def test_a_spent_budget_or_a_hopeless_end_gives_up(
    request_: TrainRequest, tmp_path: Path, ends: list[Any], message: str
) -> None:
    with pytest.raises(GiveUp, match=message):
        drive(request_, Script(ends), tmp_path)


def test_exit_zero_for_ever_does_not_loop_for_ever(request_: TrainRequest, tmp_path: Path) -> None:
    with pytest.raises(GiveUp, match="exited 0 without being complete"):
        drive(request_, Script([("complete", 0, 3, 3)] * 20), tmp_path)


def test_a_cancel_leaves_a_checkpoint_to_resume_from(request_: TrainRequest, tmp_path: Path) -> None:
    with pytest.raises(Cancelled, match="checkpoint of step 7 stands"):
        drive(request_, Script([("cancelled", 143, 7, 7)]), tmp_path)
    trained, _ = drive(request_, Script([("complete", 0, 40, 40)]), tmp_path)
    assert trained.attempts == 2


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ([("spot", 137, 1, 1), ("complete", 0, 40, 40)], ["FINISHED: 1: spot, steps 0-1; 2: complete, steps 1-40"]),
        ([("cancelled", 143, 7, 7)], ["KILLED: 1: cancelled, steps 0-7"]),
        ([("user_error", 1, 0, 0)] * 2, ["FAILED: 1: user_error, steps 0-0; 2: user_error, steps 0-0"]),
    ],
)
def test_mlflow_is_told_how_it_ended(
    request_: TrainRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: list[Any], told: list[str]
) -> None:
    heard: list[str] = []
    tags: dict[str, str] = {}
    monkeypatch.setattr("tasks.train_model.find_or_create_run", lambda *args, **kwargs: "run")
    monkeypatch.setattr("tasks.train_model.set_tags", lambda uri, run, new: tags.update(new))
    monkeypatch.setattr(
        "tasks.train_model.end_run", lambda uri, run, status: heard.append(f"{status}: {tags['reprise.ledger']}")
    )
    tracked = replace(request_, spec=replace(request_.spec, mlflow_uri="http://mlflow"))
    with contextlib.suppress(GiveUp):
        drive(tracked, Script(ends), tmp_path)
    assert heard == told


def test_an_attempt_left_open_by_a_killed_flow_is_asked_for_under_its_own_name(
    request_: TrainRequest, tmp_path: Path
) -> None:
    store = Store(root=str(tmp_path / "store"))
    store.write_attempts("k" * 40, [Attempt(number=1, started=time.time())])
    script = Script([("complete", 0, 40, 40)])
    trained, _ = drive(request_, script, tmp_path)
    assert (trained.attempts, script.seen[0].name) == (1, f"train-{'k' * 12}-1")


def test_an_attempt_that_finished_while_nobody_watched_gets_its_end(request_: TrainRequest, tmp_path: Path) -> None:
    first, store = drive(request_, Script([("complete", 0, 40, 40)]), tmp_path)
    store.write_attempts("k" * 40, [Attempt(number=1, started=time.time() - 60)])
    script = Script([("complete", 0, 40, 40)])  # what the place answers for a name that has ended
    trained, _ = drive(replace(request_, deadline_seconds=1.0), script, tmp_path)
    (row,) = store.attempts("k" * 40)
    assert (row.cause, row.reached_step) == ("complete", 40) and row.ended is not None
    assert (trained, len(script.seen)) == (first, 1)


def test_a_finished_training_launches_nothing(request_: TrainRequest, tmp_path: Path) -> None:
    drive(request_, Script([("complete", 0, 40, 40)]), tmp_path)
    trained, _ = drive(request_, Script([]), tmp_path)
    assert trained.attempts == 1


def test_a_result_of_another_training_is_refused(request_: TrainRequest, tmp_path: Path) -> None:
    drive(request_, Script([("complete", 0, 40, 40)]), tmp_path)
    other = replace(request_, spec=replace(request_.spec, key="x" * 40))
    with pytest.raises(GiveUp, match="belongs to training kkkkkkkkkkkk"):
        drive(other, Script([]), tmp_path)


def test_progress_skips_lines_that_a_kill_cut(tmp_path: Path) -> None:
    (tmp_path / "p").write_text('{"step": 1}\n{"step": 2, "ti\n{"step": 3}\n')
    assert [e["step"] for e in progress_of(str(tmp_path / "p"))] == [1, 3]
    assert progress_of(str(tmp_path / "none")) == []
