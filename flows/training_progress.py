"""The training's progress bar in Prefect's UI: step, epoch and loss, from the file that the trainer writes.

Drawn only while train_model runs and only when it takes long enough to be looked at. A server that is away costs the
bar. Not covered: the terminal's line (flows.watch), the curve afterwards (flows.curve).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from flows.artifact import show
from flows.run import Run

SECONDS = 3.0  # between looks
TAIL_BYTES = 4096


@asynccontextmanager
async def training_progress(run: Run) -> AsyncIterator[None]:
    """Keep the bar up to date while the body runs; afterwards it shows where the training ended."""
    bar = _Bar(run)
    drawing = asyncio.create_task(bar.draw())
    try:
        yield
    finally:
        drawing.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # a bar is no reason to fail
            await drawing
        with contextlib.suppress(Exception):
            await bar.finish()


class _Bar:
    def __init__(self, run: Run) -> None:
        self._run = run
        self._drawn = False
        self._file = run.store.path / "trainings" / run.plan.steps["train_model"].key / "progress.jsonl"

    def _status(self) -> str:
        return str(self._run.step_row("train_model")["status"])

    async def draw(self) -> None:
        while not self._drawn or self._status() == "running":
            await asyncio.sleep(SECONDS)
            if self._status() == "running":
                await self._show()

    async def finish(self) -> None:
        """The trainer tells of a step now and then only: a training that is done was at its last one."""
        if self._drawn:
            await self._show(done=self._status() == "done")

    async def _show(self, *, done: bool = False) -> None:
        if (last := newest_step(self._file)) is None:
            return
        step = last["max_steps"] if done else last["step"]
        share = 100.0 * step / max(1, last["max_steps"])
        said = f"step {step} of {last['max_steps']}, epoch {last['epoch'] + 1}, loss {last['loss']:.4g}"
        await show(self._run, "training", "progress", share, said)
        self._drawn = True


def newest_step(file: Path) -> dict[str, Any] | None:
    """The last step that the trainer told of, None if there is none yet."""
    try:
        with file.open("rb") as text:
            text.seek(max(0, file.stat().st_size - TAIL_BYTES))
            lines = text.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"step", "max_steps", "epoch", "loss"} <= entry.keys():
            return entry
    return None
