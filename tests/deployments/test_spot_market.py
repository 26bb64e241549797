from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from deployments.errors import ConfigError
from deployments.spot_market import Interruption, SpotMarket, state_path


def tell(progress: Path, step: int, max_steps: int = 100, **more: float) -> None:
    with progress.open("a") as file:
        file.write(json.dumps({"step": step, "max_steps": max_steps, "time": time.time(), **more}) + "\n")


def test_parse() -> None:
    assert Interruption.parse("notice@35%") == Interruption(text="notice@35%", notice=True, fraction=0.35)
    assert Interruption.parse("kill@2.5s") == Interruption(text="kill@2.5s", notice=False, seconds=2.5)


@pytest.mark.parametrize("text", ["", "35%", "notice", "notice@35", "stop@3%", "notice@-3%", "kill@0%", "kill@100%", 5])
def test_parse_refuses_and_says_what_was_found_and_expected(text: str) -> None:
    with pytest.raises(ConfigError, match="expected") as error:
        Interruption.parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("plan", [["kill@70%", "notice@35%"], ["kill@3s", "kill@1s"], ["kill@70%", "kill@70%"]])
def test_a_plan_out_of_order_or_twice_is_refused(plan: list[str]) -> None:
    with pytest.raises(ConfigError, match="interruptions"):
        SpotMarket(plan)


@pytest.mark.parametrize("grace", [0, -1, float("nan"), float("inf")])
def test_a_grace_that_is_none_is_refused(grace: float) -> None:
    with pytest.raises(ConfigError, match="grace"):
        SpotMarket([], grace)


def test_each_interruption_comes_once_in_order_also_for_a_market_that_starts_anew(tmp_path: Path) -> None:
    progress, began = tmp_path / "progress.jsonl", time.time()
    market = SpotMarket(["notice@35%", "kill@70%"])
    assert market.due(progress, started=began) is None  # no file yet
    tell(progress, 34)
    assert market.due(progress, started=began) is None
    tell(progress, 35)
    first = market.due(progress, started=began)
    assert first is not None and first.text == "notice@35%"
    assert market.claim(progress, first, job="a") is True
    assert SpotMarket(["notice@35%", "kill@70%"]).claim(progress, first, job="a") is False
    assert market.due(progress, started=began) is None
    tell(progress, 71)
    again = SpotMarket(["notice@35%", "kill@70%"])
    second = again.due(progress, started=began)
    assert second is not None and second.text == "kill@70%"
    assert again.claim(progress, second, job="b")
    assert again.due(progress, started=began) is None
    assert [d["job"] for d in json.loads(state_path(progress).read_text())["delivered"]] == ["a", "b"]


def test_lines_of_an_earlier_attempt_do_not_count(tmp_path: Path) -> None:
    progress = tmp_path / "progress.jsonl"
    tell(progress, 90, time=time.time() - 60)
    market, began = SpotMarket(["kill@70%"]), time.time()
    assert market.due(progress, started=began) is None
    tell(progress, 50)
    assert market.due(progress, started=began) is None
    tell(progress, 70)
    assert market.due(progress, started=began) is not None


def test_half_a_line_and_rubbish_are_passed_over(tmp_path: Path) -> None:
    progress, began = tmp_path / "progress.jsonl", time.time()
    market = SpotMarket(["kill@70%"])
    progress.write_text('rubbish\n[1]\n{"step": 99}\n{"step": 99, "max_steps": 0}\n{"step": 80, "max_')
    assert market.due(progress, started=began) is None
    with progress.open("a") as file:
        file.write('steps": 100}\n')
    assert market.due(progress, started=began) is not None


def test_by_time_since_the_training_began_not_the_attempt(tmp_path: Path) -> None:
    progress = tmp_path / "progress.jsonl"
    market = SpotMarket(["notice@30s"])
    assert market.due(progress, started=time.time() - 20) is None
    state = json.loads(state_path(progress).read_text())
    state["began"] -= 20
    state_path(progress).write_text(json.dumps(state))
    assert SpotMarket(["notice@30s"]).due(progress, started=time.time()) is not None
