"""Golden requests: held-out samples with the torch model's own answers, and how an answer is judged against them.

`heldout.jsonl` is written by the trainer, one JSON object a line: name, body_b64, label, answer. Numbers may differ by
a tolerance (another batch size sums in another order), labels and words may not. Standard library only.
Not covered: where the requests are sent (tasks.rollout, tasks.check_endpoint, tasks.admission).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.errors import GiveUp

OURS = ("model", "model_version")  # what the handler adds to postprocess's answer


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One request and the answer that the torch model gave to it."""

    name: str
    body: bytes
    label: Any  # the true one, None if it is not known
    answer: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an answer compares with the golden one."""

    agrees: bool
    difference: float  # largest among numbers; inf if something else differs
    why: str  # "" if it agrees


def read_golden(path: str | Path, count: int | None = None) -> list[Golden]:
    """`count` samples spread evenly over the file, or all. Raises GiveUp naming the line that is wrong."""
    file = Path(str(path).removeprefix("file://"))
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise GiveUp(
            f"held-out answers {file}: {error.strerror}; the training writes them when it is complete"
        ) from error
    if not lines:
        raise GiveUp(f"held-out answers {file}: no samples; a model cannot prove itself on nothing")
    wanted = len(lines) if count is None else max(1, min(count, len(lines)))
    numbers = sorted({index * len(lines) // wanted for index in range(wanted)})
    return [parse(lines[number], f"{file}:{number + 1}") for number in numbers]


def parse(line: str, where: str) -> Golden:
    """One line of the file. Raises GiveUp."""
    try:
        row = json.loads(line)
        body = base64.b64decode(row["body_b64"], validate=True)
        answer = row["answer"]
        if not isinstance(answer, dict) or "label" not in answer:
            raise ValueError("answer has no label")
        return Golden(name=str(row["name"]), body=body, label=row.get("label"), answer=answer)
    except (ValueError, KeyError, TypeError) as error:
        raise GiveUp(f"{where}: no golden sample ({type(error).__name__}: {error})") from error


def judge(answer: Mapping[str, Any], golden: Mapping[str, Any], tolerance: float) -> Verdict:
    """Compare an endpoint's answer with the torch model's, field by field."""
    given = {key: value for key, value in answer.items() if key not in OURS}
    wanted = {key: value for key, value in golden.items() if key not in OURS}
    largest, why = compare(given, wanted, "answer")
    if not why and given["label"] != wanted["label"]:  # numeric labels get no tolerance
        largest, why = math.inf, f"label {given['label']!r}, expected {wanted['label']!r}"
    if not why and largest > tolerance:
        why = f"numbers differ by {largest:.3g}, allowed {tolerance:.3g}"
    return Verdict(agrees=not why, difference=largest, why=why)


def compare(given: Any, wanted: Any, where: str) -> tuple[float, str]:
    """Largest difference of numbers, and the first thing that differs otherwise."""
    if isinstance(wanted, bool) or isinstance(given, bool) or wanted is None or isinstance(wanted, str):
        same = type(given) is type(wanted) and given == wanted
        return (0.0, "") if same else (math.inf, f"{where}: {given!r}, expected {wanted!r}")
    if isinstance(wanted, (int, float)) and isinstance(given, (int, float)):
        difference = abs(given - wanted)
        return (difference, "") if math.isfinite(difference) else (math.inf, f"{where}: {given!r}, expected {wanted!r}")
    if isinstance(wanted, dict) and isinstance(given, dict) and given.keys() == wanted.keys():
        pairs = [(f"{where}.{key}", given[key], wanted[key]) for key in wanted]
    elif isinstance(wanted, list) and isinstance(given, list) and len(given) == len(wanted):
        pairs = [(f"{where}[{n}]", a, b) for n, (a, b) in enumerate(zip(given, wanted, strict=True))]
    else:
        return math.inf, f"{where}: {repr(given)[:80]}, expected {repr(wanted)[:80]}"
    largest = 0.0
    for name, a, b in pairs:
        difference, why = compare(a, b, name)
        if why:
            return math.inf, why
        largest = max(largest, difference)
    return largest, ""


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie (nearest rank); nan for none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan
