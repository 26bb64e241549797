"""What a training tells while it runs: JSON lines that rank 0 and the wrapper append to one file.

Steps: {"step", "max_steps", "epoch", "loss", "data_seconds", "time"}; data_seconds is what fetching took since the line
before. Events: {"event": "resumed" | "checkpoint" | "notice" | ...}.
A line is one write to a file opened for appending, so writers do not mix and a kill leaves at most one half line.
Not covered: metrics servers (training/tracking.py).
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

PACE = "REPRISE_PACE"  # environment variable: least seconds of a step, for proofs that aim at moments of it
EVERY = "REPRISE_PROGRESS_EVERY"  # environment variable: seconds between lines about steps


class Progress:
    """Appends to the file; with no file it does nothing."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644) if path else -1
        self._told = 0.0
        self._epoch = -1
        self._data = 0.0  # seconds of fetching since the last line
        self._every = float(os.environ.get(EVERY, "0.5"))

    def step(
        self, *, step: int, max_steps: int, epoch: int, loss: float, data_seconds: float = 0.0, always: bool = False
    ) -> None:
        """Tell a finished step; at most one line per half second (or what EVERY says) unless `always`.

        The first step of each epoch also goes to the log, for whoever reads that.
        """
        self._data += data_seconds
        if self._file >= 0 and epoch != self._epoch:
            self._epoch = epoch
            print(f"epoch {epoch + 1}: step {step}/{max_steps}, loss {loss:.4f}", flush=True)
        if always or time.monotonic() - self._told >= self._every:
            self._told = time.monotonic()
            line = {"step": step, "max_steps": max_steps, "epoch": epoch, "loss": loss}
            self._write({**line, "data_seconds": round(self._data, 4), "time": time.time()})
            self._data = 0.0

    def event(self, name: str, **fields: Any) -> None:
        """Tell that something happened."""
        self._write({"event": name, **fields, "time": time.time()})

    def _write(self, line: dict[str, Any]) -> None:
        if self._file >= 0:
            os.write(self._file, (json.dumps(line) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
