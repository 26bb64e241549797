"""A flow run that comes again finds the run that it began; one lock says that it lives."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import TryAgain
from flows.prefect_start import _again, _turn, flow_lock, run_of
from flows.start import Order
from tasks.records import Store


def keep(store: Store, status: str) -> dict[str, Any]:
    document = {
        "run": "digits-4",
        "status": status,
        "process": 1,
        "git_sha": "a" * 40,
        "overrides": ["train.epochs=3"],
        "cause": "push",
    }
    store.write("runs/digits-4", document)
    store.write("flow-runs/f1", {"run": "digits-4"})
    return document


def test_the_run_of_a_flow_run(tmp_path: Path) -> None:
    store = Store(root=str(tmp_path))
    assert run_of(store, "f1") is None
    store.write("flow-runs/f1", {"run": "digits-4"})
    assert run_of(store, "f1") is None, "killed before the document was written"
    keep(store, "running")
    found = run_of(store, "f1")
    assert found is not None and found["status"] == "interrupted", "nobody holds its lock"


@pytest.mark.parametrize(
    ("status", "resume"),
    [
        ("interrupted", "digits-4"), ("cancelled", "digits-4"), ("failed", "digits-4"), ("waiting", "digits-4"),
        ("refused", ""), ("succeeded", ""),
    ],
)  # fmt: skip
def test_it_goes_on_at_its_own_commit(tmp_path: Path, status: str, resume: str) -> None:
    """Its branch may have moved; a finished run is repeated as a new one, at the same commit."""
    order = _again(Order(rev="main", cause="form"), keep(Store(root=str(tmp_path)), status))
    assert (order.rev, order.overrides, order.cause, order.resume) == ("a" * 40, ("train.epochs=3",), "push", resume)


def test_killed_while_it_reported_it_goes_on_with_the_same_run(tmp_path: Path) -> None:
    document = keep(Store(root=str(tmp_path)), "succeeded")
    assert _again(Order(), {**document, "closed": False}).resume == "digits-4"
    assert _again(Order(), {**document, "closed": True}).resume == ""


def test_a_turn_is_waited_for_without_stopping_the_loop(tmp_path: Path) -> None:
    store = Store(root=str(tmp_path))

    async def both() -> list[str]:
        told = []

        async def other() -> None:
            async with AsyncExitStack() as held:
                await _turn(held, store, flow_lock("f1"), seconds=10)
                told.append("second")

        async with AsyncExitStack() as held:
            await _turn(held, store, flow_lock("f1"), seconds=0)
            waiting = asyncio.create_task(other())
            await asyncio.sleep(0.1)
            told.append("first")
        await waiting
        return told

    assert asyncio.run(both()) == ["first", "second"]


def test_a_turn_that_never_comes(tmp_path: Path) -> None:
    store = Store(root=str(tmp_path))

    async def wait() -> None:
        async with AsyncExitStack() as held:
            await _turn(held, store, "pipeline-digits", seconds=0)

    with store.lock("pipeline-digits"), pytest.raises(TryAgain, match="is held by process"):
        asyncio.run(wait())
