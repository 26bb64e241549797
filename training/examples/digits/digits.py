"""Handwritten digits, 8 x 8 grey values: what Reprise asks of a model's module, for images.

A split is a folder of <label>/<name>.pgm files; a request is the bytes of one such file. Shifts and dropout come from
torch's generator, inside the model: a training that resumes has to bring that generator back, or its weights differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, TensorDataset

SIDE = 8
LABELS = 10
_HEADER = re.compile(rb"P5\s+(?:#[^\n]*\n\s*)*(\d+)\s+(?:#[^\n]*\n\s*)*(\d+)\s+(?:#[^\n]*\n\s*)*(\d+)\s")


class RandomShift(nn.Module):
    """While training, move each image by up to `most` pixels in both directions; otherwise leave it."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> the same shape."""
        if not self.training or not self.most:
            return images
        padded = nn.functional.pad(images, (self.most,) * 4)
        count = len(images)
        offsets = torch.randint(0, 2 * self.most + 1, (2, count, 1), device=images.device)
        rows, columns = torch.arange(SIDE, device=images.device) + offsets
        which = torch.arange(count, device=images.device)[:, None, None]
        return padded[which, 0, rows[:, :, None], columns[:, None, :]][:, None]


def build_model(params: dict[str, Any]) -> nn.Module:
    """The network: (N, 1, 8, 8) in 0..1 -> (N, 10) scores. No batch statistics, so the number of workers is free."""
    width = int(params.get("width", 16))
    return nn.Sequential(
        RandomShift(int(params.get("shift", 1))),
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(float(params.get("dropout", 0.25))),
        nn.Linear(2 * width * (SIDE // 2) ** 2, 64),
        nn.ReLU(),
        nn.Linear(64, LABELS),
    )


def build_optimizer(model: nn.Module, params: dict[str, Any]) -> Optimizer:
    """AdamW."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=float(params.get("learning_rate", 3e-3)),
        weight_decay=float(params.get("weight_decay", 0.01)),
    )


def build_scheduler(optimizer: Optimizer, params: dict[str, Any], total_steps: int) -> LambdaLR:
    """A tenth of the steps to warm up, then half a cosine down to a hundredth."""
    warm = max(1, total_steps // 10)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total_steps - warm))))

    return LambdaLR(optimizer, rate)


def load_split(folder: Path, split: str, params: dict[str, Any]) -> Dataset[tuple[Tensor, ...]]:
    """All images of a split, in the order of their names: items (1 x 8 x 8 float, label)."""
    files = _files(folder, split)
    images = torch.stack([preprocess(file.read_bytes()) for file in files])
    return TensorDataset(images, torch.tensor([int(file.parent.name) for file in files]))


def heldout_requests(folder: Path, split: str, params: dict[str, Any]) -> Iterator[tuple[str, bytes, Any]]:
    """(name, request body, label) of each image of a split, in the order of their names."""
    for file in _files(folder, split):
        yield f"{file.parent.name}/{file.name}", file.read_bytes(), int(file.parent.name)


def preprocess(body: bytes) -> Tensor:
    """The bytes of a binary PGM file, 8 x 8 -> (1, 8, 8) in 0..1. Raises ValueError saying what is wrong with them."""
    header = _HEADER.match(body)
    if header is None:
        raise ValueError("expected a binary PGM image (P5, width, height, largest value, pixels)")
    width, height, largest = (int(n) for n in header.groups())
    pixels = body[header.end() :]
    if (width, height) != (SIDE, SIDE):
        raise ValueError(f"expected an image of {SIDE} x {SIDE} pixels, got {width} x {height}")
    if not 1 <= largest <= 255:
        raise ValueError(f"expected a largest value of 1 to 255, got {largest}")
    if len(pixels) != SIDE * SIDE:
        raise ValueError(f"expected {SIDE * SIDE} bytes of pixels, got {len(pixels)}")
    if max(pixels) > largest:
        raise ValueError(f"expected pixels of at most {largest}, got {max(pixels)}")
    return torch.tensor(list(pixels), dtype=torch.float32).reshape(1, SIDE, SIDE) / largest


def postprocess(output: Tensor) -> dict[str, Any]:
    """(10,) scores -> the likeliest digit and the probability of each."""
    scores = torch.softmax(output.float(), dim=0)
    return {"label": int(scores.argmax()), "scores": [round(float(s), 6) for s in scores]}


def _files(folder: Path, split: str) -> list[Path]:
    files = sorted((Path(folder) / split).glob("*/*.pgm"))
    if not files:
        raise FileNotFoundError(f"{Path(folder) / split}: no <label>/<name>.pgm in it; expected images of the split")
    return files
