"""The report's timeline: bars in percent, few and round ticks, where each attempt ran."""

from __future__ import annotations

import pytest

from tasks import report_page as page
from tasks import report_timeline
from tests.tasks.report_kit import T0, attempt, make_document


def test_timeline_is_in_percent_and_marks_what_was_reused() -> None:
    document = make_document()
    document["steps"][0].update(reused=True, status="reused", started=None, ended=None, reason="data unchanged")
    shown = report_timeline.timeline(document)
    pull, train, *_, check = shown["rows"]
    assert (pull["status"], pull["bars"], pull["reason"], pull["length"]) == ("reused", [], "data unchanged", "")
    assert [b["kind"] for b in train["bars"]] == ["idle", "cut", "cut", "work"]
    assert train["bars"][0]["left"] == 0 and check["bars"][0]["left"] + check["bars"][0]["width"] == pytest.approx(100)
    for row in shown["rows"]:
        for bar in row["bars"]:
            assert 0 <= bar["left"] <= 100 and 0 < bar["width"] <= 100 - bar["left"] + 1e-6
    assert [t["text"] for t in shown["ticks"]] == ["0", "10 s", "20 s", "30 s", "40 s"]
    assert report_timeline.timeline({"steps": []})["ticks"] == []


@pytest.mark.parametrize("span", [0.2, 3, 61, 599, 3700, 90000, 2_000_000])
def test_ticks_are_few_and_round(span: float) -> None:
    document = make_document()
    document["steps"] = [{"name": "train_model", "started": T0, "ended": T0 + span, "status": "done"}]
    ticks = report_timeline.timeline(document | {"attempts": []})["ticks"]
    assert ticks[0] == {"left": 0.0, "text": "0"}
    assert span > 500_000 or 2 <= len(ticks) <= 6
    assert all(t["left"] <= 94 for t in ticks)


def test_an_attempt_without_a_node_is_no_error_and_a_fallback_is_told() -> None:
    attempts = [
        attempt(1, T0, T0 + 9, "no_capacity", (0, 0, 0), reason="no node within 9 s", asked="spot first"),
        attempt(2, T0 + 9, T0 + 20, "complete", (0, 40, 40), capacity="on-demand", node="n1", asked="got no spot node"),
    ]
    assert page.summary({"status": "succeeded", "attempts": attempts}).startswith("Trained without an interruption")
    waited, done = report_timeline.attempt_rows(attempts)
    assert (waited["cause"], waited["kind"], waited["mark"]) == ("no capacity", "warn", 0)
    assert (waited["where"], done["where"]) == ("spot (spot first)", "on-demand n1 (got no spot node)")
