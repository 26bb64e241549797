"""What a profile said of a training, for whoever shows it: one sentence from a file. Standard library only.

    sentence_of(spec.output)       # "data loading: 41% of 18 ms a step; ..." or ""

Not covered: making a profile (training/profile.py, which imports torch).
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER, FILE, TRACE = "profile", "verdict.json", "trace.json.gz"  # below a training's output


def sentence_of(output: str | Path) -> str:
    """The verdict of the newest profile of that training; "" if there is none, or none that can be read."""
    try:
        found = json.loads((Path(output) / FOLDER / FILE).read_text())
    except (OSError, ValueError):
        return ""
    return str(found.get("sentence") or "") if isinstance(found, dict) else ""
