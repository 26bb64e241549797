"""What came of a run, in words: a page for each end, links that are there, no bar that breaks the table."""

from __future__ import annotations

from typing import Any

import pytest

from flows.result_page import count, headline, result_markdown, training_words

DOCUMENT: dict[str, Any] = {
    "run": "digits-4",
    "pipeline": "digits",
    "status": "succeeded",
    "message": "",
    "cause": "form",
    "git_sha": "56aa416" + "0" * 33,
    "overrides": ["train.epochs=14"],
    "attempts": [{"cause": "spot", "steps_lost": 1}, {"cause": "complete", "steps_lost": 0}],
    "model_version": "3",
    "endpoint": "http://127.0.0.1:18080/predictions/digits",
    "metrics": {"loss": 0.0625, "accuracy": 0.98309},
    "gate": {"sentences": ["accuracy 0.98309 >= 0.95 (gate.minimum, the minimum)"]},
    "check": {"samples": 355, "agreement": 1.0, "p95_ms": 21.86},
    "links": {"mlflow_run": "http://m/#/runs/1", "model": "http://m/#/models/digits/versions/3", "endpoint": "x"},
}


def test_a_run_that_is_in_service_tells_all() -> None:
    page = result_markdown(DOCUMENT)
    assert headline(DOCUMENT) == "digits version 3 is in service"
    for told in (
        "| digits-4 | succeeded |",
        "| Training run in MLflow | [open](http://m/#/runs/1) |",
        "| Model version in MLflow | [open](http://m/#/models/digits/versions/3) |",
        "| Endpoint | `curl -T FILE http://127.0.0.1:18080/predictions/digits` |",
        "| Held-out data | accuracy 0.9831, loss 0.0625 |",
        "- accuracy 0.98309 >= 0.95 (gate.minimum, the minimum)",
        "| Endpoint checked | 355 samples, agreement 1, p95 21.9 ms |",
        "| Training | 2 attempts, 1 interruption, 1 step lost |",
        "| Commit, cause | `56aa41600000`, form |",
        "| Changed for this run | `train.epochs=14` |",
    ):
        assert told in page.splitlines(), told
    assert "Report" not in page, "there is none yet"


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("waiting", "version 3 waits for a decision"),
        ("refused", "what was in service before stays there"),
        ("failed", "digits: failed"),
        ("cancelled", "digits: cancelled"),
        ("unchanged", "version 3 stays in service"),
    ],
)
def test_every_end_has_its_sentence(status: str, said: str) -> None:
    assert said in headline({**DOCUMENT, "status": status})


def test_a_run_that_hardly_began_has_what_there_is() -> None:
    nothing = {"attempts": [], "overrides": [], "metrics": {}, "links": {}, "endpoint": None, "model_version": None}
    early = {**DOCUMENT, **nothing, "status": "failed", "message": "no data"}
    del early["gate"], early["check"]
    page = result_markdown(early)
    assert page.splitlines() == [
        "no data", "", "| digits-4 | failed |", "|---|---|", "| Commit, cause | `56aa41600000`, form |",
    ]  # fmt: skip


def test_a_comment_cannot_break_the_table() -> None:
    page = result_markdown({**DOCUMENT, "approval": {"decision": "refuse", "comment": "a | b\n\nc"}})
    assert "| Decided by a person | refuse: a / b c |" in page.splitlines()


def test_one_and_many() -> None:
    assert (count(1, "attempt"), count(0, "attempt")) == ("1 attempt", "0 attempts")
    assert training_words({"attempts": [{"cause": "complete", "steps_lost": 0}]}) == "1 attempt, no interruption"
