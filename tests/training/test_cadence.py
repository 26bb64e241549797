"""The interval between saves, and the warning about the notice."""

from __future__ import annotations

import math

import pytest

from training.cadence import Cadence, best_interval, grace_fit, observed_mtbf, p95
from training.spec import CheckpointPolicy


def lost_share(interval: float, stall: float, mtbf: float) -> float:
    """Daly's expected cost of a unit of work with exponential failures."""
    return (mtbf / interval) * (math.exp((interval + stall) / mtbf) - 1)


@pytest.mark.parametrize(("stall", "mtbf"), [(0.5, 3600.0), (5.0, 3600.0), (30.0, 1800.0), (0.01, 60.0)])
def test_no_other_interval_loses_notably_less(stall: float, mtbf: float) -> None:
    best = best_interval(stall, mtbf)
    least = min(lost_share(best * (0.5 + i / 100), stall, mtbf) for i in range(150))
    assert lost_share(best, stall, mtbf) <= least * 1.0005


def test_a_stall_longer_than_the_time_between_interruptions_has_a_finite_interval() -> None:
    assert best_interval(100.0, 10.0) == 10.0


def test_the_interval_stays_within_the_bounds_and_follows_the_stall() -> None:
    cadence = Cadence(policy=CheckpointPolicy(min_seconds=5, max_seconds=60), mtbf=3600, last_save=0.0)
    assert cadence.interval == 5, "the first save comes early: it measures"
    cadence.measured(stall=0.001, durable=1.0)
    assert cadence.interval == 5
    for _ in range(3):
        cadence.measured(stall=0.1, durable=1.0)
    assert cadence.interval == pytest.approx(best_interval(0.1, 3600))
    for _ in range(9):
        cadence.measured(stall=30.0, durable=1.0)
    assert cadence.interval == 60


def test_due_by_time_waits_for_the_save_on_its_way() -> None:
    cadence = Cadence(policy=CheckpointPolicy(min_seconds=5), mtbf=3600, last_save=100.0)
    assert not cadence.due(7, 104.9)
    assert cadence.due(7, 105.0)
    assert not cadence.due(7, 105.0, busy=True)


def test_due_by_time_is_the_step_that_ends_nearest_to_the_interval() -> None:
    cadence = Cadence(policy=CheckpointPolicy(min_seconds=3, max_seconds=5), mtbf=3600, last_save=100.0)
    cadence.stepped(1.0, saving=False)
    cadence.measured(stall=1.0)
    assert cadence.interval == 5
    assert not cadence.due(7, 103.4), "this step ends at 104.4, the next one at 105.4, which is nearer"
    assert cadence.due(7, 103.6)
    cadence = Cadence(policy=CheckpointPolicy(min_seconds=5, max_seconds=5), mtbf=3600, last_save=100.0)
    cadence.stepped(1.0, saving=False)
    assert not cadence.due(7, 103.9) and cadence.due(7, 104.0), "never sooner than the user allows"


def test_due_by_steps_is_exact() -> None:
    cadence = Cadence(policy=CheckpointPolicy(every_steps=5), mtbf=3600, last_save=0.0)
    assert [step for step in range(1, 16) if cadence.due(step, 1e9, busy=True)] == [5, 10, 15]


def test_observed_interruptions_correct_the_guess() -> None:
    assert observed_mtbf(3600, 0, 0) == 3600
    assert observed_mtbf(3600, 1200, 3) == 1200
    assert observed_mtbf(3600, 360_000, 100) == pytest.approx(3600, rel=0.01)


def test_p95() -> None:
    assert p95([]) == 0.0
    assert p95([3.0, 1.0]) == 3.0
    assert p95([float(i) for i in range(1, 101)]) == 95.0


def test_grace_fit_names_the_tightest_limit() -> None:
    assert grace_fit([], 1.0, notice=1, grace=1) == ""
    assert grace_fit([4.0] * 20, 1.0, notice=120, grace=25) == ""
    told = grace_fit([40.0] * 20, 2.0, notice=120, grace=25)
    assert "42.0 s" in told and "grace period" in told and "25 s" in told
    assert "platform's notice" in grace_fit([40.0], 2.0, notice=20, grace=25)


def test_a_save_that_slows_the_steps_beside_it_costs_more_than_its_stall() -> None:
    cadence = Cadence(policy=CheckpointPolicy(min_seconds=0.1, max_seconds=60), mtbf=100, last_save=0.0)
    for _ in range(10):
        cadence.stepped(0.1, saving=False)
    for seconds in (0.13, 0.17):
        cadence.stepped(seconds, saving=True)
    cadence.measured(stall=0.001, durable=0.2)
    assert cadence.cost == pytest.approx(0.1)
    assert cadence.interval == pytest.approx(best_interval(0.1, 100))
    cadence.stepped(0.1, saving=True)
    cadence.measured(stall=0.001, durable=0.2)
    assert cadence.cost == pytest.approx(0.05), "the mean over saves"


def test_a_save_costs_its_stall_at_least() -> None:
    cadence = Cadence(policy=CheckpointPolicy(min_seconds=0.1, max_seconds=60), mtbf=100, last_save=0.0)
    cadence.stepped(0.2, saving=False)
    cadence.stepped(0.1, saving=True)
    cadence.measured(stall=0.03, durable=0.2)
    assert cadence.cost == 0.03
