"""Kills of a training at planned moments: what is drawn from the seed, how it is aimed, what is sent.

SIGTERM or SIGKILL, at one worker, torchrun's agent or everything; while a save is on its way, or at any moment of a
step, also twice within an epoch. Some launches may restart killed workers themselves, others leave it to the next one.
Not covered: what must come out in spite of them (training/verify_resume.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.launch import descendants
from training.progress import EVERY, PACE

TARGETS = ("worker", "agent", "everything")
PATIENCE = 300.0  # seconds without a line of progress after which a training counts as stuck


class Stuck(Exception):
    """A training has told nothing for PATIENCE seconds."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One planned kill: what gets which signal, when."""

    target: str  # worker | agent | everything
    signal: str  # SIGTERM | SIGKILL
    moment: str  # step: `after` seconds past the first step of the attempt; save: past the start of a save
    after: float
    restarts: int  # how often the wrapper of that launch may restart workers by itself
    processes: int


def plan_kills(seed: int, count: int, *, seconds: float, processes: int, elastic: bool) -> list[Kill]:
    """`count` kills drawn from the seed; `seconds` is how long the uninterrupted training takes."""
    chance = random.Random(seed)
    kinds = [(target, name) for target in TARGETS for name in ("SIGKILL", "SIGTERM")]
    chance.shuffle(kinds)
    kills = []
    for index in range(count):
        target, name = kinds[index % len(kinds)]
        save = index % 3 == 2
        # every other pair comes so early that it hits the epoch of the kill before it again
        reach = 0.02 if save else seconds * (0.5 / max(1, count) if index % 4 == 1 else 1.2 / max(1, count))
        kills.append(
            Kill(
                target=target,
                signal=name,
                moment="save" if save else "step",
                after=chance.uniform(0.0, reach),
                restarts=chance.choice((0, 3)),
                processes=chance.randint(1, processes) if elastic else processes,
            )
        )
    return kills


@dataclass(kw_only=True)
class Launched:
    """A running training and what its progress file has told since it started."""

    process: subprocess.Popen[bytes]
    progress: Path
    offset: int
    lines: list[dict[str, Any]]

    def read(self) -> list[dict[str, Any]]:
        """New whole lines."""
        if not self.progress.exists():
            return []
        with self.progress.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        new = []
        for line in whole.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # half a line of a killed writer
                new.append(json.loads(line))
        self.lines += new
        return new

    def last(self, key: str) -> Any:
        """The newest value of that key in any line, or None."""
        return next((line[key] for line in reversed(self.lines) if key in line), None)


def launch(spec_file: Path, *, processes: int, restarts: int, pace: float, grace: float) -> Launched:
    """Start the wrapper, in a session of its own."""
    command = [sys.executable, "-m", "training.launch", "--spec", str(spec_file)]
    progress = Path(json.loads(spec_file.read_text())["progress"])
    process = subprocess.Popen(
        [*command, "--processes", str(processes), "--restarts", str(restarts), "--grace", str(grace)],
        env=os.environ | {EVERY: "0", PACE: str(pace)},
        start_new_session=True,
    )
    offset = progress.stat().st_size if progress.exists() else 0
    return Launched(process=process, progress=progress, offset=offset, lines=[])


@contextlib.contextmanager
def ended(running: Launched) -> Iterator[None]:
    """Leave no process behind, whatever happens."""
    try:
        yield
    finally:
        if running.process.poll() is None:
            kill_tree(running.process.pid)
        running.process.wait()


def aim(running: Launched, kill: Kill) -> bool:
    """Wait for the kill's moment, in workers started since the last kill; False when the training ended before it."""
    alive, quiet = False, time.monotonic()
    while running.process.poll() is None:
        for line in running.read():
            quiet = time.monotonic()
            alive = alive or line.get("event") == "started"
            if alive and (line.get("event") == "saving" if kill.moment == "save" else "loss" in line):
                time.sleep(kill.after)
                running.read()
                return running.process.poll() is None
        if time.monotonic() - quiet > PATIENCE:
            raise Stuck(f"no progress for {PATIENCE:g} s: the training is stuck")
        time.sleep(0.001)
    running.read()
    return False


def strike(running: Launched, kill: Kill, done: list[dict[str, Any]]) -> None:
    """Send the signal. A process that has just ended counts as hit."""
    number = signal.Signals[kill.signal]
    first = max(i for i, line in enumerate(running.lines) if line.get("event") == "started")
    started = running.lines[first]
    workers = {line["rank"]: line["pid"] for line in running.lines[first:] if line.get("event") == "worker"}
    if kill.target == "everything" and number == signal.SIGKILL:
        kill_tree(running.process.pid)
        return
    pid = {"worker": workers[len(done) % len(workers)], "agent": started["agent"]}.get(kill.target, running.process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and everything below it, as a node that vanishes."""
    for target in [pid, *descendants(pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)


def wait(running: Launched) -> int:
    """The exit code. Raises Stuck when nothing moves for PATIENCE seconds."""
    quiet = time.monotonic()
    while running.process.poll() is None:
        if running.read():
            quiet = time.monotonic()
        if time.monotonic() - quiet > PATIENCE:
            raise Stuck(f"no progress for {PATIENCE:g} s: the training is stuck")
        time.sleep(0.02)
    running.read()
    return running.process.returncode
