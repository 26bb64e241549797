"""A step of no run: its program on a place's runner, asked for by a flow run and named after it.

    step = LoneStep(place=place, name="roll_back", flow_run=flow_run)
    with step.ending():
        result = await asyncio.to_thread(step.run, request, pipeline="digits")

A flow that comes again adopts what it started. It has the account of deploying steps. Not covered: steps of runs
(flows.program), what they do (tasks).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from deployments.workload import Runner, Workload
from flows.place import Place
from flows.prefect_api import Prefect
from flows.program import judge


@dataclass(kw_only=True)
class LoneStep:
    """One step of a flow run."""

    place: Place
    name: str  # of tasks.step.STEPS
    flow_run: str
    runner: Runner | None = field(default=None, init=False)  # while it runs

    @property
    def workload(self) -> str:
        """The workload's name."""
        return f"{self.name.replace('_', '-')}-{self.flow_run[:23]}"

    def run(self, request: Any, *, pipeline: str) -> dict[str, Any]:
        """Its result as JSON, or its error raised."""
        self.runner = self.place.runner()
        workload = Workload(
            name=self.workload,
            image="step",
            command=("python", "-m", "tasks.step", self.name, "{request}", "{result}"),
            request=asdict(request),
            resources=self.place.wanted("deploy_model"),
            account="deploy",
            labels={"pipeline": pipeline, "step": self.name},
        )
        result: dict[str, Any] = judge(self.runner.run(workload), self.name)["result"]
        return result

    @contextmanager
    def ending(self) -> Iterator[None]:
        """A flow that is cancelled stops its step; one whose pod has to go leaves it to the next pod."""
        try:
            yield
        except asyncio.CancelledError:
            if self.runner is not None:
                state = (Prefect(url=self.place.urls["prefect"]).run(self.flow_run) or {}).get("state") or {}
                if state.get("type") in ("CANCELLING", "CANCELLED"):
                    self.runner.stop(self.workload)
                else:
                    self.place.leave(self.runner)
            raise
