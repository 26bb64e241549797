"""Why a process of the laptop ended: its exit code and what the place did to it, read as one of the causes.

0 is complete. What the place ended itself has the place's cause: spot, cancelled, deadline. Otherwise 137 is
out_of_memory if the kernel's count of such kills rose meanwhile (in our cgroup, else on the machine: then it may have
been another program's), else node_lost, as are 143, 129 and a death without a trace (a power cut, a SIGKILL of
everything): somebody else's hand cannot be told from a lost machine. 130 is cancelled. Any other code is a user_error;
so is 1..127 after a spot notice, because a program that takes its notice well exits 143.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.workload import Cause


def cause_of(code: int | None, ending: Mapping[str, Any], oom_before: int) -> tuple[Cause, str]:
    """Why it ended, and one sentence about it."""
    told = "it left no exit code" if code is None else f"exit {code}"
    if code == 0:
        return "complete", "exit 0"
    if ending and (ending["cause"] != "spot" or code in (None, 137, 143)):
        return ending["cause"], f"{ending['why']}; {told}"
    if code is None:
        return ("node_lost", "it ended without an exit code: a power cut, or a SIGKILL of it and its supervisor")
    if code == 137:
        if (kills := oom_kills() - oom_before) > 0:
            return ("out_of_memory", f"exit 137, and the kernel counts {kills} more killed for lack of memory")
        return (
            "node_lost",
            "exit 137: a SIGKILL that this place did not send, and no lack of memory in the kernel's count",
        )
    if code in (143, 129):
        return ("node_lost", f"exit {code}: a signal that this place did not send (a shutdown, or somebody's kill)")
    if code == 130:
        return "cancelled", "exit 130: interrupted from the keyboard"
    if code > 128:
        return "user_error", f"exit {code}: it died of {_signal_name(code - 128)}"
    after = f" after {ending['why']}" if ending else ""
    return "user_error", f"exit {code}{after}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def oom_kills() -> int:
    """How many processes the kernel has killed for lack of memory: in our cgroup, else on the machine; 0 if untold."""
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with contextlib.suppress(OSError):
            for line in Path(path).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0
