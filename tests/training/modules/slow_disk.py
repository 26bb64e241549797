"""tiny.py on a disk that takes its time: parameter `fsync` is how many seconds each one lasts."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from tests.training.modules import tiny
from tests.training.modules.tiny import build_scheduler, heldout_requests, load_split, postprocess, preprocess

__all__ = ["build_model", "build_scheduler", "heldout_requests", "load_split", "postprocess", "preprocess"]
_fsync = os.fsync


def build_model(params: dict[str, Any]) -> torch.nn.Module:
    def fsync(file: int) -> None:
        time.sleep(float(params.get("fsync", 0.0)))
        _fsync(file)

    os.fsync = fsync
    return tiny.build_model(params)
