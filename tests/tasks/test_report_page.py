"""The report's headline and its table of wrong answers."""

from __future__ import annotations

from typing import Any

import pytest

from tasks import report_page as page
from tests.tasks.report_kit import T0, attempt, make_document


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, "Trained through 2 interruptions, 20 steps lost, accuracy 0.9778 ≥ 0.95, version 3 in service."),
        (
            {"attempts": [attempt(1, T0, T0 + 5, "complete", (0, 9, 9))]},
            "Trained without an interruption, accuracy 0.9778 ≥ 0.95, version 3 in service.",
        ),
        (
            {"status": "refused", "gate": {"metric": "accuracy", "value": 0.9, "refusals": ["accuracy 0.9 < 0.95"]}},
            "Trained through 2 interruptions, 20 steps lost, refused by the gate: accuracy 0.9 < 0.95.",
        ),
        (
            {"gate": {"metric": "loss", "value": 0.2, "minimum": 0.5, "higher_is_better": False}},
            "Trained through 2 interruptions, 20 steps lost, loss 0.2 ≤ 0.5, version 3 in service.",
        ),
        (
            {"status": "failed", "message": "no disk.", "steps": [{"name": "deploy_model", "status": "failed"}]},
            "Failed at deploy_model: no disk.",
        ),
        ({"status": "cancelled", "steps": []}, "Cancelled."),
        (
            {"status": "unchanged", "steps": [{"name": "train_model", "reused": True}]},
            "Training reused, accuracy 0.9778 ≥ 0.95, version 3 in service.",
        ),
        (  # it trained, and came again when a person had approved
            {"resumed": 1, "steps": [{"name": "train_model", "reused": True}]},
            "Trained through 2 interruptions, 20 steps lost, accuracy 0.9778 ≥ 0.95, version 3 in service.",
        ),
    ],
)
def test_one_sentence(change: dict[str, Any], sentence: str) -> None:
    assert page.summary(make_document() | change) == sentence


def test_confusion_is_for_classes_only() -> None:
    assert page.confusion([]) is None
    assert page.confusion([{"label": 1.5, "answer": {"label": 1.4}}]) is None, "a regression has no classes"
    assert page.confusion([{"label": i, "answer": {"label": i}} for i in range(21)]) is None, "too many to read"
    assert page.confusion([{"label": 1}]) is None
    table = page.confusion([{"label": i % 11, "answer": {"label": i % 11}} for i in range(22)])
    assert table is not None and table["names"] == [str(i) for i in range(11)], "by number, not by letter"
    words = page.confusion([{"label": "dog", "answer": {"label": "cat"}}])
    assert words is not None and (words["names"], words["wrong"]) == (["cat", "dog"], 1)
