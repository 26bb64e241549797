"""A run on the terminal while it happens: a line per step, and on a terminal one moving line of progress.

Events come from flows.run; lines of a step's log that carry progress (steps of training, files pulled) move the line,
the others stay in the log. Not covered: tables after the fact (flows.inspect_runs).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

from flows.display import SIGNS, moving, say, seconds

HEARTBEAT_SECONDS = 10.0  # without a terminal: how often a running step says that it is alive


class Watch:
    """Prints what happens to a run. Thread-safe: steps report from their own threads."""

    def __init__(self, *, quiet: bool = False, attempts: int = 0) -> None:
        """`attempts`: how many of the ledger's rows are known already, from an earlier flow."""
        self.quiet = quiet
        self.terminal = sys.stdout.isatty()
        self._lock = threading.Lock()
        self._line = ""
        self._told: dict[str, float] = {}
        self._attempts = attempts

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        if self.quiet:
            return
        with self._lock:
            if kind == "step":
                self._step(fields)
            elif kind == "attempts":
                self._ledger(fields["attempts"])
            elif kind == "line":
                self._progress(fields["step"], fields["line"])

    def _step(self, step: dict[str, Any]) -> None:
        status, name = step["status"], step["name"]
        if status == "running":
            self._moving(f"{SIGNS['running']} {name} …")
            return
        self._clear()
        style = {"done": "green", "reused": "cyan", "failed": "red", "cancelled": "yellow"}.get(status, "")
        detail = step["reason"] if status == "reused" else seconds(step["seconds"]) if status == "done" else status
        say(f"{SIGNS.get(status, ' ')} {name:<15} {detail}", style=style)

    def _ledger(self, attempts: list[dict[str, Any]]) -> None:
        ended = [a for a in attempts if a["ended"] is not None]
        for attempt in ended[self._attempts :]:
            if attempt["cause"] == "complete":
                continue
            self._clear()
            say(_told(attempt), style="yellow")
        self._attempts = len(ended)

    def _progress(self, step: str, line: str) -> None:
        text = _progress_text(step, line)
        if not text:
            return
        if self.terminal:
            self._moving(f"{SIGNS['running']} {step:<15} {text}")
        elif time.monotonic() - self._told.get(step, 0.0) > HEARTBEAT_SECONDS:
            self._told[step] = time.monotonic()
            say(f"  {step} {text}")

    def _moving(self, text: str) -> None:
        moving(text)
        self._line = text

    def _clear(self) -> None:
        if self._line:
            moving("")
            self._line = ""

    def close(self) -> None:
        """Leave the terminal clean."""
        with self._lock:
            self._clear()
            sys.stdout.flush()


def _told(attempt: dict[str, Any]) -> str:
    """An attempt that ended before the training did, in one line."""
    number, cause, lost = attempt["number"], attempt["cause"], attempt["steps_lost"]
    if cause in ("user_error", "out_of_memory"):
        return f"  ✗ attempt {number}: {attempt['reason']}"
    saved = f", saved {attempt['notice_to_saved']:.2f} s after the notice" if attempt["notice_to_saved"] else ""
    goes_on = "its checkpoint stands at" if cause in ("cancelled", "deadline") else "resuming from"
    return (
        f"  ⚡ attempt {number}: {cause} at step {attempt['reached_step']}, {lost} steps lost{saved}; "
        f"{goes_on} step {attempt['to_step']}"
    )


def _progress_text(step: str, line: str) -> str:
    """What a log line says of progress; empty if nothing."""
    if step == "train_model" and line.startswith("{"):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            return ""
        if "loss" not in entry:
            return ""
        return f"step {entry['step']}/{entry['max_steps']}  epoch {entry['epoch'] + 1}  loss {entry['loss']:.4f}"
    return line.removeprefix(f"{step}: ").strip() if line.startswith(f"{step}: ") else ""
