"""Plays the spot market on a laptop: takes a trainer away at given points, as a cloud does at points nobody knows.

`SpotMarket(interruptions=["notice@35%", "kill@70%"], grace_seconds=10)` interrupts a training twice: with notice at
35 % of its steps (SIGTERM, the grace, SIGKILL), and without notice at 70 % (SIGKILL of the whole tree). `notice@20s`
counts seconds since the training's first attempt began. Each happens once per training, through all its attempts: what
was delivered is written beside the progress file before the signal goes out, so no crash of ours repeats one.
The Runner asks in its waiting loop; there is no process of the market's own.
Not covered: real spot signals (on a cluster Kubernetes delivers them), prices.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError

PROGRESS = "REPRISE_PROGRESS"  # the environment variable that names a training's progress file
_FORM = re.compile(r"(?P<kind>notice|kill)@(?P<value>\d+(\.\d+)?)(?P<unit>%|s)")


@dataclass(frozen=True, kw_only=True)
class Interruption:
    """One planned loss of the trainer. Exactly one of `fraction` (0..1 of the steps) and `seconds` is set."""

    text: str  # as written: notice@35%
    notice: bool  # SIGTERM and a grace first
    fraction: float | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str) -> Interruption:
        """Read `notice@35%`, `kill@70%`, `notice@20s`. Raises ConfigError."""
        match = _FORM.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(
                f"interruption {text!r}: expected notice@N% or kill@N% (N percent of the steps) "
                "or notice@Ns or kill@Ns (N seconds after the training began), for example notice@35%"
            )
        value, notice = float(match["value"]), match["kind"] == "notice"
        if match["unit"] == "s":
            return cls(text=text, notice=notice, seconds=value)
        if not 0 < value < 100:
            raise ConfigError(f"interruption {text!r}: expected more than 0 % and less than 100 % of the steps")
        return cls(text=text, notice=notice, fraction=value / 100)


@dataclass
class _Watch:
    """How far one attempt's progress file has been read."""

    offset: int = 0
    rest: bytes = b""
    fraction: float = 0.0


def state_path(progress: Path) -> Path:
    """Where it is kept what a training has been through already: beside its progress file."""
    return progress.with_name(f"{progress.name}.spot.json")


class SpotMarket:
    """Decides when a training is interrupted next; the Runner carries it out."""

    def __init__(self, interruptions: Sequence[str] = (), grace_seconds: float = 10.0) -> None:
        """`grace_seconds` lie between notice and SIGKILL. Raises ConfigError for a plan that makes no sense."""
        if not 0 < grace_seconds < 86400:
            raise ConfigError(f"spot grace {grace_seconds!r}: expected more than 0 and less than 86400 seconds")
        self.plan = tuple(Interruption.parse(text) for text in interruptions)
        if len({i.text for i in self.plan}) != len(self.plan):
            raise ConfigError(f"interruptions {list(interruptions)}: the same one twice; each happens once a training")
        for unit in ("fraction", "seconds"):
            values = [v for i in self.plan if (v := getattr(i, unit)) is not None]
            if values != sorted(values):
                raise ConfigError(f"interruptions {list(interruptions)}: expected in the order in which they happen")
        self.grace_seconds = float(grace_seconds)
        self._watches: dict[tuple[str, float], _Watch] = {}
        self._states: dict[Path, dict[str, Any]] = {}

    def due(self, progress: Path, *, started: float) -> Interruption | None:
        """The interruption to deliver now to the attempt that began at `started` (unix seconds), if any."""
        if not self.plan:
            return None
        state = self._state(progress, started)
        left = [i for i in self.plan if i.text not in {d["interruption"] for d in state["delivered"]}]
        if not left:
            return None
        reached = self._fraction(progress, started)
        for interruption in left:
            if interruption.fraction is not None and reached >= interruption.fraction:
                return interruption
            if interruption.seconds is not None and time.time() - state["began"] >= interruption.seconds:
                return interruption
        return None

    def claim(self, progress: Path, interruption: Interruption, *, job: str) -> bool:
        """Write down, before the signal goes out, that this training has had it; False if it had it already.

        Call it under the job's lock: two Runners that wait for the same trainer must not both deliver.
        """
        path = state_path(progress)
        with contextlib.suppress(FileNotFoundError):
            self._states[path] = json.loads(path.read_text())
        state = self._states[path]
        if interruption.text in {d["interruption"] for d in state["delivered"]}:
            return False
        state["delivered"].append({"interruption": interruption.text, "job": job, "time": time.time()})
        self._write(path)
        return True

    def _state(self, progress: Path, started: float) -> dict[str, Any]:
        path = state_path(progress)
        if path not in self._states:  # once: claim() reads it again before anything happens
            try:
                self._states[path] = json.loads(path.read_text())
            except FileNotFoundError:
                self._states[path] = {"began": started, "delivered": []}
                self._write(path)
        return self._states[path]

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(json.dumps(self._states[path], indent=1))
        aside.replace(path)

    def _fraction(self, progress: Path, started: float) -> float:
        """The share of the steps that the attempt's newest line tells; 0 while it has written none."""
        watch = self._watches.setdefault((str(progress), started), _Watch())
        try:
            if progress.stat().st_size <= watch.offset:
                return watch.fraction
            with progress.open("rb") as file:
                file.seek(watch.offset)
                new = file.read()
        except FileNotFoundError:
            return watch.fraction
        watch.offset += len(new)
        *lines, watch.rest = (watch.rest + new).split(b"\n")
        for line in lines:
            # Lines of earlier attempts stand in the same file, and a killed trainer leaves half a line behind.
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                told = json.loads(line)
                if told.get("time", started) >= started and told["max_steps"] > 0:
                    watch.fraction = told["step"] / told["max_steps"]
        return watch.fraction
