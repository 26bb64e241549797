"""What a workload's program wrote as its result: its pod's termination message, or a file on the state volume.

Not covered: what came of the workload (cluster_outcome.py).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deployments.pod_causes import exit_of

Json = dict[str, Any]
RESULT_SECONDS = 5.0  # a file on a network volume may come into sight late


def result_of(pods: Sequence[Json], *, container: str, folder: Path | None, expected: bool) -> Json | None:
    """The termination message if it is whole, else `result.json` of the folder, waited for a while if `expected`."""
    for pod in pods:
        with contextlib.suppress(ValueError):
            message = json.loads(exit_of(pod, container).get("message") or "")
            if isinstance(message, dict) and "ok" in message:
                return message
    until = time.monotonic() + (RESULT_SECONDS if expected else 0.0)
    while folder is not None:
        found = _read(folder / "result.json")
        if found is not None or time.monotonic() > until:
            return found
        time.sleep(0.1)
    return None


def _read(path: Path) -> Json | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
