"""The rolling update's recovery, against a played cluster: every kill, a cancellation, a race, an API that is away."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace
from typing import Any

import pytest

from deployments.errors import StepError
from tasks.deploy_model import deploy_model, run
from tests.tasks.killed_deployment_kit import at_once, killed_after
from tests.tasks.rolling_bench_kit import Bench
from tests.tasks.rolling_kit import DEPLOYMENTS, NAME

TRANSITIONS = 11  # of a rolling update, see test_rolling_update.py


def some(*fast: int) -> list[Any]:
    """All transitions; those that are not named only in the long run."""
    numbers = range(1, TRANSITIONS + 1)
    return [number if number in fast else pytest.param(number, marks=pytest.mark.long) for number in numbers]


@pytest.mark.parametrize("transition", some(1, 4, 8, 9))
def test_killed_at_a_transition_the_same_deployment_again_is_one_rollout(bench: Bench, transition: int) -> None:
    deploy_model(bench.requests["1"])
    bench.pods.templates.clear()
    assert killed_after(bench.requests["2"], transition) == -signal.SIGKILL
    deploy_model(bench.requests["2"])
    assert bench.truth() == ("2", "2", [bench.label("2")])
    assert bench.pods.templates == [bench.label("2")]
    assert bench.record.read()["transaction"] is None


@pytest.mark.parametrize("then", ["1", "3"])
@pytest.mark.parametrize("transition", some(5))
def test_killed_at_a_transition_another_deployment_ends_right(bench: Bench, transition: int, then: str) -> None:
    deploy_model(bench.requests["1"])
    killed_after(bench.requests["2"], transition)
    deploy_model(bench.requests[then])
    assert bench.truth() == (then, then, [bench.label(then)])
    assert bench.record.read()["transaction"] is None


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 25))])
def test_seeded_kills_of_good_and_bad_updates(bench: Bench, seed: int) -> None:
    """Kill after kill without a clean-up in between, among faults and deletions by hand; then one that runs through."""
    dice = random.Random(seed)
    deploy_model(bench.requests["1"])
    for _ in range(6 if seed else 2):
        version = dice.choice("123")
        bench.pods.faults = {bench.label(v): "wrong" for v in "23" if dice.random() < 0.3}
        if dice.random() < 0.2 and bench.pods.kube.has(DEPLOYMENTS, NAME):
            bench.pods.kube.remove(DEPLOYMENTS, NAME)
        killed_after(replace(bench.requests[version], golden_count=2), dice.randint(1, 12))
    bench.pods.faults = {}
    final = dice.choice("123")
    deploy_model(bench.requests[final])
    assert bench.truth() == (final, final, [bench.label(final)])


def test_a_cancelled_update_is_undone_at_once(bench: Bench) -> None:
    deploy_model(bench.requests["1"])

    def cancel(phase: str) -> None:
        if phase in ("soaking", "undoing"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit, match="143"):
        run(bench.requests["2"], cancel)
    assert bench.truth() == ("1", "1", [bench.label("1")]) and bench.record.read()["transaction"] is None


def test_processes_at_once_end_in_one_winner(bench: Bench) -> None:
    at_once([bench.requests[v] for v in "1233"])
    version, alias, labels = bench.truth()
    assert version in {"1", "2", "3"} and alias == version and labels == [bench.label(version or "")]


def test_an_api_that_is_away_is_try_again_and_nothing_is_lost(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy_model(bench.requests["1"])
    monkeypatch.setattr("deployments.kube_api.PATIENCE", 0.3)

    def away(phase: str) -> None:
        if phase == "applying":
            bench.pods.kube.fail("PATCH", "deployments", 503, times=10_000)

    with pytest.raises(StepError, match="does not answer"):
        run(bench.requests["2"], away)
    bench.pods.kube.faults.clear()
    deploy_model(bench.requests["2"])
    assert bench.truth() == ("2", "2", [bench.label("2")])
