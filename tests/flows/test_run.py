"""A run's identity: new, gone on with, or found dead."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deployments.errors import ConfigError
from flows.plan import STEPS, Plan, PlannedStep
from flows.run import Run, open_run, read_run, run_ids
from tasks.records import Attempt, Store


def plan(key: str = "k") -> Plan:
    steps = {n: PlannedStep(name=n, key=key + n, inputs={}, reused=False, reason="first time") for n in STEPS}
    pipeline = SimpleNamespace(name="digits", file="/p/pipeline.toml")
    fields: dict[str, Any] = {
        "pipeline": pipeline, "place": SimpleNamespace(kind="laptop"), "project": Path("/p"), "git_sha": "a" * 40,
        "data": SimpleNamespace(digest="d.dir"), "code_digest": "c", "steps": steps,
    }  # fmt: skip
    return Plan(**fields)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(root=str(tmp_path))


def begin(store: Store, key: str = "k", *, status: str, resume: str = "") -> dict[str, Any]:
    with open_run(plan(key), store, rev="HEAD", overrides=[], cause="command", resume=resume) as (run, document):
        store.write(f"runs/{run}", {**document, "status": status})
        return {**document, "held": store.held(f"run-{run}")}


def test_runs_are_numbered_and_locked_while_they_run(store: Store) -> None:
    first = begin(store, status="succeeded")
    second = begin(store, status="succeeded")
    assert [first["run"], second["run"]] == ["digits-1", "digits-2"]
    assert first["held"]
    assert not store.held("run-digits-1")


@pytest.mark.parametrize("status", ["running", "failed", "cancelled", "interrupted"])
def test_an_unfinished_run_of_the_same_work_goes_on(store: Store, status: str) -> None:
    begin(store, status=status)
    again = begin(store, status="succeeded")
    assert (again["run"], again["resumed"]) == ("digits-1", 1)


@pytest.mark.parametrize("status", ["succeeded", "unchanged", "refused"])
def test_a_finished_run_does_not_go_on(store: Store, status: str) -> None:
    begin(store, status=status)
    assert begin(store, status="succeeded")["run"] == "digits-2"


def test_other_work_is_another_run(store: Store) -> None:
    begin(store, "k", status="failed")
    assert begin(store, "other", status="succeeded")["run"] == "digits-2"


def test_a_resume_names_its_run_and_renews_the_budgets_of_a_failed_one(store: Store) -> None:
    first = begin(store, status="failed")
    begin(store, "other", status="succeeded")
    resumed = begin(store, status="succeeded", resume="digits-1")
    assert resumed["run"] == "digits-1"
    assert resumed["budget_since"] > first["budget_since"]


def test_a_flow_that_died_goes_on_within_its_budgets(store: Store) -> None:
    first = begin(store, status="running")
    assert begin(store, status="succeeded")["budget_since"] == first["budget_since"]


def test_a_run_whose_process_died_is_told_as_interrupted(store: Store) -> None:
    begin(store, status="running")
    document = read_run(store, "digits-1")
    assert document["status"] == "interrupted"
    assert f"its process {os.getpid()} died; `reprise resume digits-1` goes on" in document["message"]


def test_an_unknown_run_names_the_last_ones(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"run 'digits-9' does not exist.*there is none yet"):
        read_run(store, "digits-9")
    begin(store, status="succeeded")
    with pytest.raises(ConfigError, match="the last runs are: digits-1"):
        read_run(store, "digits-9")


def test_ids_sort_by_number_and_a_claim_without_words_is_skipped(store: Store) -> None:
    for _ in range(11):
        begin(store, status="succeeded")
    assert run_ids(store, "digits")[-1] == "digits-11"
    (store.path / "runs" / "digits-12.json").write_text("null")
    assert begin(store, status="succeeded")["run"] == "digits-13"


def test_attempts_and_steps_are_written_as_they_change(store: Store) -> None:
    events = list[str]()
    with open_run(plan(), store, rev="HEAD", overrides=[], cause="command") as (run_id, document):
        run = Run(
            id=run_id, plan=plan(), store=store, runner=cast("Any", None), urls={}, document=document,
            on_event=lambda kind, fields: events.append(kind),
        )  # fmt: skip
        run.step_changed("pull_data", status="running", started=1.0)
        run.attempts_changed([Attempt(number=1, started=1.0, cause="spot", reached_step=9, to_step=7)])
        run.finish_step("pull_data", {"folder": "x"}, 0.5)
        seen = read_run(store, run_id)
    assert seen["steps"][0]["status"] == "running"
    assert seen["attempts"][0]["steps_lost"] == 2
    assert events == ["step", "attempts"]
    record = store.step("kpull_data")
    assert record is not None
    assert (record.run, record.seconds) == ("digits-1", 0.5)
    assert store.read("pipelines/digits") == {"pull_data": "kpull_data"}
