"""The random streams of a shard: Python's, NumPy's, torch's and CUDA's generators, captured and put back exactly.

Dropout, augmentation and samplers draw from these four. A resumed training continues them where they stood; a rank that
works for several shards swaps them, so that a shard draws the same numbers on whichever rank it runs.
Not covered: generators that the user's code makes for itself (they are not reachable from here).
"""

from __future__ import annotations

import base64
import hashlib
import random
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


def derive(seed: int, *words: object) -> int:
    """A 63-bit seed for one purpose, from the training's seed and the words that name the purpose."""
    digest = hashlib.sha256(":".join(map(str, (seed, *words))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed all four generators (CUDA's on all devices; lazily, so no context is made)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """The four generators at one moment. `cuda` is None where the rank has no CUDA device."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """The state of this process's generators now."""
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(),  # type: ignore[arg-type]
            cpu=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        )

    def restore(self, device: torch.device) -> None:
        """Put the generators back. A state taken without CUDA leaves a CUDA generator as it is."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda, device)

    def to_json(self) -> dict[str, Any]:
        """As JSON: the words of the generators in base64, their counters as numbers."""
        version, words, gauss = self.python
        kind, keys, position, has_gauss, cached = self.numpy
        return {
            "python": [version, _pack(struct.pack(f"<{len(words)}Q", *words)), gauss],
            "numpy": [
                kind,
                _pack(np.asarray(keys, dtype="<u4").tobytes()),
                int(position),
                int(has_gauss),
                float(cached),
            ],
            "cpu": _pack(self.cpu.numpy().tobytes()),
            "cuda": None if self.cuda is None else _pack(self.cuda.numpy().tobytes()),
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> RandomState:
        """Read back what `to_json` gave."""
        version, words, gauss = raw["python"]
        kind, keys, position, has_gauss, cached = raw["numpy"]
        unpacked = base64.b64decode(words)
        return cls(
            python=(version, struct.unpack(f"<{len(unpacked) // 8}Q", unpacked), gauss),
            numpy=(kind, np.frombuffer(base64.b64decode(keys), dtype="<u4").copy(), position, has_gauss, cached),
            cpu=_tensor(raw["cpu"]),
            cuda=None if raw["cuda"] is None else _tensor(raw["cuda"]),
        )


def _pack(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
