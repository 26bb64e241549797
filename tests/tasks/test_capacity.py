"""Spot or on-demand: the policy on ledgers, and the loop over attempts that follows it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.errors import ConfigError, GiveUp
from deployments.workload import INTERRUPTIONS, Outcome, Workload
from tasks.capacity import CapacityPolicy, choose, seconds_left
from tasks.records import Attempt, Store
from tasks.train_model import TrainRequest, first_attempt, train_model
from training.spec import TrainSpec

FALL = CapacityPolicy(fallback=True, fallback_after=2, start_seconds=60.0)
CAUSES = ("spot", "consolidation", "node_lost", "no_capacity", "user_error", "out_of_memory")


def ledger(*rows: tuple[str, str]) -> list[Attempt]:
    return [
        Attempt(number=n, started=10.0 * n, ended=10.0 * n + 5, cause=cause, capacity=capacity)
        for n, (capacity, cause) in enumerate(rows, 1)
    ]


S, D = "spot", "on-demand"


@pytest.mark.parametrize(
    ("policy", "rows", "capacity", "reason"),
    [
        (FALL, [], S, "spot first"),
        (FALL, [(S, "spot")], S, "interrupted 1 times on spot"),
        (FALL, [(S, "spot"), (S, "node_lost")], D, "interrupted 2 times on spot"),
        (FALL, [(S, "user_error"), (S, "out_of_memory"), (S, "complete")], S, "spot first"),
        (FALL, [(D, "node_lost"), (D, "spot")], S, "spot first"),
        (FALL, [(S, "no_capacity")], D, "attempt 1 got no spot node"),
        (FALL, [(S, "no_capacity"), (D, "no_capacity")], S, "attempt 2 got no on-demand node"),
        (FALL, [(S, "no_capacity"), (D, "node_lost")], S, "spot first"),
        (FALL, [(S, "spot"), (S, "spot"), (D, "no_capacity")], S, "attempt 3 got no on-demand node"),
        (replace(FALL, fallback_after=0), [(S, "spot")] * 9, S, "interrupted 9 times on spot"),
        (replace(FALL, fallback=False), [(S, "spot"), (S, "no_capacity"), (S, "spot")], S, ""),
        (CapacityPolicy(spot=False, fallback=True), [], D, "on-demand only"),
        (CapacityPolicy(), [(S, "spot")] * 9, S, ""),
    ],
)
def test_the_next_attempt(policy: CapacityPolicy, rows: list[tuple[str, str]], capacity: str, reason: str) -> None:
    choice = choose(policy, ledger(*rows), now=1000.0)
    assert (choice.capacity, choice.reason) == (capacity, reason)


def test_the_deadline_asks_for_on_demand_and_ends_the_wait_for_spot_in_time() -> None:
    def at(now: float, left: float | None = 100.0) -> tuple[str, float | None]:
        choice = choose(FALL, [], now=now, until=1000.0, left=left)
        return choice.capacity, choice.start_seconds

    assert at(0.0) == (S, 60.0)
    assert at(800.0) == (S, 50.0)  # at 850 the 150 s that 100 s of training may take are left
    assert at(849.9) == (S, 1.0)
    assert at(850.0) == (D, 60.0)
    assert at(999.0, None) == (S, 60.0)  # nothing is known of the pace
    late = choose(FALL, [], now=990.0, until=1000.0, left=100.0)
    assert late.reason == "10 s to the deadline, and 100 s of training left"


def test_the_time_left_is_read_from_the_trainers_lines() -> None:
    def step(number: int, at: float) -> dict[str, Any]:
        return {"step": number, "max_steps": 100, "time": at}

    lines = [
        {"event": "started", "time": 0.0}, step(1, 5.0), step(11, 15.0),
        {"event": "checkpoint", "step": 11, "time": 15.5}, step(21, 25.0),
        {"event": "started", "time": 100.0}, step(12, 108.0), step(22, 118.0),
    ]  # fmt: skip
    assert seconds_left(lines, 20) == pytest.approx(8.0 + 80 * 1.0)  # a second a step, eight to start
    assert seconds_left(lines[:2], 0) is None
    assert seconds_left([], 0) is None


class Places:
    """A runner whose attempts end as the causes say; where none is left, the training is complete."""

    place = "script"

    def __init__(self, causes: Sequence[str], *, cut: int = -1) -> None:
        self.causes, self.seen, self.cut = iter(causes), list[Workload](), cut

    def run(self, workload: Workload, *, on_line: Any = None) -> Outcome:
        self.seen.append(workload)
        if len(self.seen) == self.cut:
            raise KeyboardInterrupt
        cause = next(self.causes, "complete")
        if cause == "complete":
            spec = workload.request
            Path(spec["output"], "result.json").write_text(
                f'{{"key": "{spec["key"]}", "step": 4, "max_steps": 4, "epoch": 1, "samples_seen": 4, "metrics": {{}}, '
                '"weights": "w", "weights_sha256": "s", "heldout": "h", "parameters": 3, "seconds": 1.0}'
            )
        now = time.time()
        capacity = S if workload.spot else D
        return Outcome(
            name=workload.name, exit_code=None, cause=cause, reason=f"ended by {cause}", started=now, ended=now,  # type: ignore[arg-type]
            node="" if cause == "no_capacity" else "n1", capacity=capacity,
        )  # fmt: skip

    def stop(self, name: str, *, grace_seconds: float | None = None) -> None:
        raise AssertionError("nothing stops it here")

    def logs(self, name: str, *, follow: bool = False) -> Iterator[str]:
        yield from ()


def request(folder: Path, **changes: Any) -> TrainRequest:
    spec = TrainSpec(
        key="k" * 40, pipeline="digits", module="m.py", data="d", checkpoints=f"file://{folder}/c",
        output=str(folder / "out"), progress=str(folder / "progress.jsonl"),
    )  # fmt: skip
    return TrainRequest(**{"spec": spec, "experiment": "digits", "capacity": FALL, **changes})


def test_each_choice_is_a_fact_of_the_ledger_and_is_told(tmp_path: Path) -> None:
    store, places, lines = Store(root=str(tmp_path)), Places(["spot", "no_capacity", "node_lost"]), list[str]()
    train_model(request(tmp_path), runner=places, store=store, on_line=lines.append)
    rows = store.attempts("k" * 40)
    assert [(a.capacity, a.cause, a.asked, a.node) for a in rows] == [
        (S, "spot", "spot first", "n1"),
        (S, "no_capacity", "interrupted 1 times on spot", ""),
        (D, "node_lost", "attempt 2 got no spot node", "n1"),
        (S, "complete", "interrupted 1 times on spot", "n1"),
    ]
    assert [w.spot for w in places.seen] == [True, True, False, True]
    assert [w.start_seconds for w in places.seen] == [60.0] * 4
    assert lines[2] == f"training {'k' * 12}: attempt 3 asks for on-demand: attempt 2 got no spot node"


def test_an_attempt_without_a_node_spends_no_budget_and_the_deadline_bounds_them(tmp_path: Path) -> None:
    waiting = replace(FALL, fallback=False)
    asked = request(tmp_path, capacity=waiting, interruptions=0, errors=0)
    trained = train_model(asked, runner=Places(["no_capacity"] * 7), store=Store(root=str(tmp_path)))
    assert (trained.attempts, trained.interruptions) == (8, 0)
    other = tmp_path / "other"
    for_ever = Places(["no_capacity"] * 100_000)
    with pytest.raises(GiveUp, match=r"not done within \[train\] deadline = 0.2 s"):
        train_model(replace(request(other), deadline_seconds=0.2), runner=for_ever, store=Store(root=str(other)))
    assert len(for_ever.seen) > 1


def test_the_deadline_counts_from_the_first_attempt(tmp_path: Path) -> None:
    places = Places(["spot", "spot"])
    train_model(request(tmp_path, deadline_seconds=50.0), runner=places, store=Store(root=str(tmp_path)))
    limits = [w.deadline_seconds or 0.0 for w in places.seen]
    assert limits[0] == 50.0 and limits == sorted(limits, reverse=True) and limits[2] < 50.0


def test_nodes_share_the_workers(tmp_path: Path) -> None:
    places = Places([])
    train_model(request(tmp_path, workers=6, nodes=3), runner=places, store=Store(root=str(tmp_path)))
    (seen,) = places.seen
    assert (seen.replicas, seen.processes, seen.command[-1]) == (3, 2, "2")
    with pytest.raises(ConfigError, match=r"6 workers \(\[train\] workers\) on 4 nodes"):
        request(tmp_path, workers=6, nodes=4)


def test_the_first_attempt_is_known_before_a_run(tmp_path: Path) -> None:
    assert first_attempt(request(tmp_path), now=0.0) == Attempt(number=1, started=0.0, capacity=S, asked="spot first")


@settings(max_examples=120, deadline=None)
@given(
    causes=st.lists(st.sampled_from(CAUSES), max_size=9),
    after=st.integers(0, 4),
    fallback=st.booleans(),
    cut=st.integers(-1, 10),
)
def test_whatever_happens_the_ledger_obeys_the_policy(causes: list[str], after: int, fallback: bool, cut: int) -> None:
    """Sequences of ends, with the flow killed once while it waits: the attempt is asked for again as it was."""
    with TemporaryDirectory() as folder:
        store, policy = Store(root=folder), replace(FALL, fallback=fallback, fallback_after=after)
        asked = request(Path(folder), capacity=policy, interruptions=99, errors=99)
        places = Places(causes, cut=cut)
        for _ in range(2):
            try:
                train_model(asked, runner=places, store=store)
            except KeyboardInterrupt:
                continue
            break
        rows = store.attempts("k" * 40)
        assert [a.cause for a in rows] == [*causes, "complete"]
        assert [a.number for a in rows] == list(range(1, len(rows) + 1))
        seen = {w.name: w for w in places.seen}
        assert len(seen) == len(rows), "one workload an attempt, whoever asks for it"
        for workload in places.seen:  # asked for twice, it is the same
            assert replace(workload, labels={}) == replace(seen[workload.name], labels={})
        for before, row in enumerate(rows):
            taken = sum(a.cause in INTERRUPTIONS and a.capacity == S for a in rows[:before])
            none_before = rows[before - 1].cause == "no_capacity" if before else False
            if not fallback:
                assert row.capacity == S
            elif none_before:
                assert row.capacity != rows[before - 1].capacity
            else:
                assert row.capacity == (D if after and taken >= after else S)
