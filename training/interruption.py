"""A notice (SIGTERM) turned into one agreed save, and a way out for a rank that is stuck.

The handler must be installed after init_process_group, so that a rank that still waits for its peers dies of SIGTERM at
once: it has nothing to lose. A Python handler does not run while a collective blocks, so the signal's byte is read from
a wake-up pipe by a thread. That thread is the watchdog too: when the training has not left `leave_within` seconds after
the notice (a peer is gone, a store hangs), the process leaves with 143 and without a save.
A rank's end is written to a small status file, which the wrapper reads: torchrun's own exit code tells nothing.
Not covered: agreement between ranks (it rides on the gradients: training/reduction.py), exit codes (launch.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from training.spec import EXIT_INTERRUPTED

STATUS_DIR = "REPRISE_STATUS_DIR"  # environment variable: the wrapper's folder for status files
LEAVE_WITHIN = "REPRISE_LEAVE_WITHIN"  # environment variable: seconds from notice to the forced end
LAUNCHER = "REPRISE_LAUNCHER"  # environment variable: process id of the wrapper
_PR_SET_PDEATHSIG = 1


class Interruption:
    """Whether the platform asked this process to leave, and since when."""

    def __init__(self, *, leave_within: float, on_notice: Callable[[], None] | None = None) -> None:
        """`leave_within`: seconds after the notice at which the process is ended by force."""
        self.noticed_at: float | None = None  # unix seconds
        self._leave_within, self._on_notice = leave_within, on_notice
        self._nothing_to_save = False
        self._closed = threading.Event()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._watch, name="interruption", daemon=True)

    def install(self) -> Interruption:
        """Take over SIGTERM. Call from the main thread, after init_process_group."""
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old = signal.signal(signal.SIGTERM, _note)
        self._thread.start()
        return self

    @property
    def noticed(self) -> bool:
        """True from the moment the signal came, even while the main thread is blocked."""
        return self.noticed_at is not None

    def leave_at_once(self) -> None:
        """From here on nothing would be lost: a notice, also one that came already, ends the process."""
        self._nothing_to_save = True
        if self.noticed:
            end(EXIT_INTERRUPTED, "notice")

    def close(self) -> None:
        """Give SIGTERM back and end the thread."""
        signal.signal(signal.SIGTERM, self._old)
        signal.set_wakeup_fd(self._old_fd)
        self._closed.set()
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _watch(self) -> None:
        while not self._closed.is_set():
            if signal.SIGTERM in os.read(self._read, 64):
                break
        if self._closed.is_set():
            return
        self.noticed_at = time.time()
        if self._nothing_to_save:
            end(EXIT_INTERRUPTED, "notice")
        if self._on_notice is not None:
            self._on_notice()
        if not self._closed.wait(self._leave_within):
            end(EXIT_INTERRUPTED, f"not saved within {self._leave_within:g} s of the notice")


def _note(number: int, frame: FrameType | None) -> None:
    """The wake-up pipe did the work already."""


def write_status(code: int, reason: str) -> None:
    """Tell the wrapper how this rank ends; the first word counts. A rank without a status file died hard."""
    if not (folder := os.environ.get(STATUS_DIR)):
        return
    path = Path(folder) / f"rank-{os.environ.get('RANK', '0')}.json"
    aside = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        aside.write_text(json.dumps({"code": code, "reason": reason, "time": time.time()}))
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink()


def end(code: int, reason: str) -> None:
    """Leave this process now, from any thread, telling the wrapper why. No clean-up: the collectives are broken."""
    write_status(code, reason)
    os._exit(code)


def die_with_agent() -> None:
    """Have the kernel kill this worker when torchrun's agent ends (Linux), so that no kill leaves an orphan."""
    if (launcher := os.environ.get(LAUNCHER)) and os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() in (1, int(launcher)):  # the agent ended before we asked: we are an orphan already
            os._exit(EXIT_INTERRUPTED)
