"""A step that a flow run asks for: adopted by name when the flow comes again, stopped with it, left to its next pod."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest

from deployments.errors import GiveUp, TryAgain
from deployments.workload import Outcome, Resources, Workload
from flows.lone_step import LoneStep
from flows.prefect_api import Prefect

FLOW_RUN = "0123abcd-0123-0123-0123-0123456789ab"


@dataclass
class Request:
    what: str = "it"


@dataclass
class Place:
    """Its runner too. A fake: a step that ends when it is told to, or at once with `result`."""

    result: dict[str, Any] | None = None
    urls: dict[str, str] = field(default_factory=lambda: {"prefect": "http://p"})
    names: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    left: int = 0
    began: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def wanted(self, step: str) -> Resources:
        return Resources()

    def runner(self) -> Place:
        return self

    def run(self, workload: Workload) -> Outcome:
        self.names.append(workload.name)
        self.began.set()
        if self.result is None:
            assert self.ended.wait(5)
        code = 0 if (self.result or {}).get("ok") else 1
        return Outcome(
            name="w",
            exit_code=code,
            cause="user_error",
            reason="why",
            started=0.0,
            ended=1.0,
            result=self.result,
            log="l",
        )

    def stop(self, name: str) -> None:
        self.stopped.append(name)
        self.ended.set()

    def leave(self, runner: object) -> None:
        self.left += 1
        self.ended.set()


def step_of(place: Place) -> LoneStep:
    return LoneStep(place=place, name="roll_back", flow_run=FLOW_RUN)  # type: ignore[arg-type]


def test_the_same_flow_run_gives_the_same_name() -> None:
    place = Place(result={"ok": True, "result": {"version": "3"}})
    for _ in range(2):
        assert step_of(place).run(Request(), pipeline="digits") == {"version": "3"}
    assert place.names == ["roll-back-0123abcd-0123-0123-0123"] * 2


def test_its_error_is_raised() -> None:
    place = Place(result={"ok": False, "error": {"type": "TryAgain", "message": "locked"}})
    with pytest.raises(TryAgain, match="locked"):
        step_of(place).run(Request(), pipeline="digits")
    with pytest.raises(GiveUp, match="roll_back: why"):
        step_of(Place(result={"no": "error"})).run(Request(), pipeline="digits")


@pytest.mark.parametrize(
    ("state", "stopped", "left"), [("CANCELLING", 1, 0), ("CANCELLED", 1, 0), ("RUNNING", 0, 1), ("", 0, 1)]
)
def test_a_flow_that_ends_takes_its_step_along_only_if_it_was_cancelled(
    monkeypatch: pytest.MonkeyPatch, state: str, stopped: int, left: int
) -> None:
    place = Place()
    monkeypatch.setattr(Prefect, "run", lambda self, flow_run: {"state": {"type": state}} if state else None)

    async def flow() -> None:
        step = step_of(place)

        async def body() -> None:
            with step.ending():
                await asyncio.to_thread(step.run, Request(), pipeline="digits")

        task = asyncio.ensure_future(body())
        await asyncio.to_thread(place.began.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(flow())
    assert (len(place.stopped), place.left) == (stopped, left)
    assert set(place.stopped) <= {"roll-back-0123abcd-0123-0123-0123"}


def test_a_flow_that_ends_before_its_step_began_has_nothing_to_stop() -> None:
    step = step_of(Place())
    with pytest.raises(asyncio.CancelledError), step.ending():
        raise asyncio.CancelledError
    assert step.runner is None
