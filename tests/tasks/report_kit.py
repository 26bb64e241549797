"""What the tests of the report share: a run that was interrupted twice, and what its training left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

T0 = 1795507200.0
NAMES = ("pull_data", "train_model", "register_model", "package_model", "deploy_model", "check_endpoint")


def attempt(number: int, started: float, ended: float, cause: str, steps: tuple[int, int, int], **more: Any) -> Any:
    row = {"number": number, "started": started, "ended": ended, "cause": cause, "from_step": steps[0]}
    row |= {"to_step": steps[1], "reached_step": steps[2], "idle_seconds": 0.0, "notice_to_saved": None}
    return row | {"capacity": "spot", "node": ""} | more


def make_document() -> dict[str, Any]:
    """A run that was interrupted twice and ended well."""
    steps = [
        {"name": n, "key": f"{i}" * 40, "status": "done", "reused": False, "reason": "first run", "seconds": 5.0}
        | {"started": T0 + 10 * i, "ended": T0 + 10 * i + 9}
        for i, n in enumerate(NAMES)
    ]
    attempts = [
        attempt(1, T0 + 10, T0 + 12, "spot", (0, 40, 40), notice_to_saved=0.2134),
        attempt(2, T0 + 13, T0 + 15, "spot", (40, 70, 90), idle_seconds=1.0),
        attempt(3, T0 + 16, T0 + 19, "complete", (70, 200, 200), idle_seconds=1.0),
    ]
    return {
        "run": "digits-1",
        "pipeline": "digits",
        "status": "succeeded",
        "message": "",
        "cause": "command",
        "place": "laptop",
        "git_sha": "7f3a9c0d" * 5,
        "code_digest": "c" * 64,
        "data_digest": "d" * 32 + ".dir",
        "started": T0,
        "ended": T0 + 62,
        "steps": steps,
        "attempts": attempts,
        "model_version": "3",
        "mar_sha256": "e" * 64,
        "endpoint": "http://127.0.0.1:8080/predictions/digits",
        "metrics": {},
        "links": {"prefect": "http://127.0.0.1:4200/runs/1", "model": "javascript:alert(1)"},
        "gate": {
            "metric": "accuracy",
            "value": 0.97777,
            "minimum": 0.95,
            "higher_is_better": True,
            "sentences": ["accuracy 0.97777 >= 0.95 (gate.minimum, the minimum)"],
            "refusals": [],
        },
    }


def make_files(folder: Path) -> dict[str, str]:
    """The trainer's progress over three attempts, and held-out answers with two mistakes."""
    lines: list[str] = []
    for first, last, began in ((0, 90, 10.5), (70, 200, 16.5)):
        for step in range(first + 1, last + 1):
            when = T0 + began + (step - first) * 0.02 + (2.0 if first == 0 and step > 40 else 0)
            lines.append(json.dumps({"step": step, "max_steps": 200, "loss": 2.0 / step, "time": when}))
    lines += [json.dumps({"event": "saved", "step": 40, "time": T0 + 12}), '{"step": 201, "lo']
    progress = folder / "progress.jsonl"
    progress.write_text("\n".join(lines))
    answers = [(i % 3, i % 3) for i in range(28)] + [(0, 2), (1, 2)]
    heldout = folder / "heldout.jsonl"
    heldout.write_text("".join(json.dumps({"label": a, "answer": {"label": b}}) + "\n" for a, b in answers))
    return {"progress": str(progress), "heldout": str(heldout)}
