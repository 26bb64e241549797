"""Breast tumours, 30 measurements each: what Reprise asks of a model's module, for a table.

A split is a CSV file; a request is one row of it without the diagnosis, or the same 30 numbers as a JSON list.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

LABELS = ("malignant", "benign")
# Mean and deviation of each measurement in the first training split. Fixed here, so that requests are scaled alike
# whatever the model was trained on.
# fmt: off
MEANS = (
    14.13, 19.35, 91.99, 655.1, 0.09671, 0.1047, 0.08844, 0.04913, 0.182, 0.06289,
    0.4049, 1.212, 2.862, 40.43, 0.007076, 0.02547, 0.03114, 0.01181, 0.02062, 0.003804,
    16.3, 25.79, 107.5, 884.7, 0.1331, 0.2558, 0.2726, 0.1157, 0.2921, 0.08427,
)
DEVIATIONS = (
    3.515, 4.267, 24.24, 352.9, 0.01461, 0.05307, 0.07914, 0.0389, 0.02823, 0.007074,
    0.2833, 0.5242, 2.079, 47.65, 0.003148, 0.01811, 0.02635, 0.00593, 0.008658, 0.002511,
    4.851, 6.109, 33.68, 575.8, 0.02352, 0.1573, 0.2088, 0.06637, 0.06429, 0.01771,
)
# fmt: on


def build_model(params: dict[str, Any]) -> nn.Module:
    """The network: (N, 30) scaled measurements -> (N, 2) scores."""
    width, dropout = int(params.get("width", 32)), float(params.get("dropout", 0.2))
    return nn.Sequential(
        nn.Linear(len(MEANS), width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, len(LABELS)),
    )


def metrics(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Over a whole split: accuracy, and the share of malignant tumours that were found."""
    answers = outputs.argmax(dim=1)
    malignant = targets == LABELS.index("malignant")
    return {
        "accuracy": float((answers == targets).float().mean()),
        "recall": float((answers[malignant] == targets[malignant]).float().mean()) if malignant.any() else 1.0,
    }


def load_split(folder: Path, split: str, params: dict[str, Any]) -> Dataset[tuple[Tensor, ...]]:
    """All rows of a split in the order of the file: items (30 floats, label)."""
    rows = _rows(folder, split)
    inputs = torch.stack([_scaled(row[:-1]) for row in rows])
    return TensorDataset(inputs, torch.tensor([LABELS.index(row[-1]) for row in rows]))


def heldout_requests(folder: Path, split: str, params: dict[str, Any]) -> Iterator[tuple[str, bytes, Any]]:
    """(name, request body, label) of each row of a split."""
    for number, row in enumerate(_rows(folder, split), start=2):  # as an editor counts: the header is line 1
        yield f"line {number}", ",".join(row[:-1]).encode(), row[-1]


def preprocess(body: bytes) -> Tensor:
    """A CSV row or a JSON list of 30 numbers -> (30,) scaled. Raises ValueError saying what is wrong with it."""
    try:
        text = body.decode().strip()
        values = json.loads(text) if text.startswith("[") else text.split(",")
    except ValueError as error:
        raise ValueError(f"expected a CSV row or a JSON list of {len(MEANS)} numbers: {error}") from error
    return _scaled(values)


def postprocess(output: Tensor) -> dict[str, Any]:
    """(2,) scores -> the likelier diagnosis and its probability."""
    scores = torch.softmax(output.float(), dim=0)
    best = int(scores.argmax())
    return {"label": LABELS[best], "probability": round(float(scores[best]), 6)}


def _scaled(values: list[Any]) -> Tensor:
    if len(values) != len(MEANS):
        raise ValueError(f"expected {len(MEANS)} numbers, got {len(values)}")
    numbers = []
    for place, value in enumerate(values, start=1):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"expected a number in place {place}, got {value!r}") from None
        if not math.isfinite(number):
            raise ValueError(f"expected a finite number in place {place}, got {value!r}")
        numbers.append(number)
    return (torch.tensor(numbers, dtype=torch.float32) - torch.tensor(MEANS)) / torch.tensor(DEVIATIONS)


def _rows(folder: Path, split: str) -> list[list[str]]:
    with (Path(folder) / split).open(newline="") as source:
        rows = list(csv.reader(source))[1:]
    if not rows:
        raise ValueError(f"{Path(folder) / split}: no rows below the header; expected one a sample")
    return rows
