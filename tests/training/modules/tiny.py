"""A user's module for the tests: points on a plane in three classes, dropout, noise from all random generators.

Parameters: samples, width, slow (seconds per training sample), norm (with batch norm), fail_at (raise in that call).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch


def build_model(params: dict[str, Any]) -> torch.nn.Module:
    width = int(params.get("width", 16))
    layers = [torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(width, 3)]
    if params.get("norm"):
        layers.insert(1, torch.nn.BatchNorm1d(width))
    return torch.nn.Sequential(*layers)


class Points(torch.utils.data.Dataset):
    """Made from a fixed seed; training samples carry noise drawn from Python's, NumPy's and torch's generators."""

    def __init__(self, split: str, params: dict[str, Any]) -> None:
        count = int(params.get("samples", 96)) if split == "train" else 30
        generator = torch.Generator().manual_seed(7 if split == "train" else 8)
        self.targets = torch.randint(0, 3, (count,), generator=generator)
        self.inputs = torch.randn(count, 8, generator=generator)
        self.inputs[torch.arange(count), self.targets] += 3.0
        self.noise, self.slow = split == "train", float(params.get("slow", 0.0))
        self.fail_at, self.calls = int(params.get("fail_at", -1)), 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        point = self.inputs[index]
        if self.noise:
            self.calls += 1
            if self.calls == self.fail_at:
                raise RuntimeError("a bug in the data set")
            time.sleep(self.slow)
            point = point + 0.1 * random.random() + 0.1 * float(np.random.rand()) + 0.1 * torch.randn(8)
        return point, self.targets[index]


def load_split(folder: Path, split: str, params: dict[str, Any]) -> Points:
    return Points(split, params)


def heldout_requests(folder: Path, split: str, params: dict[str, Any]) -> Iterator[tuple[str, bytes, Any]]:
    points = Points(split, params)
    for index in range(len(points)):
        point, target = points[index]
        yield f"point-{index}", point.numpy().astype("<f4").tobytes(), int(target)


def preprocess(body: bytes) -> torch.Tensor:
    if len(body) != 32:
        raise ValueError(f"expected 32 bytes, got {len(body)}")
    return torch.frombuffer(bytearray(body), dtype=torch.float32)


def postprocess(output: torch.Tensor) -> dict[str, Any]:
    return {"label": int(output.argmax()), "scores": [round(float(x), 6) for x in output.softmax(-1)]}


def build_scheduler(optimizer: torch.optim.Optimizer, params: dict[str, Any], total_steps: int) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=total_steps)
