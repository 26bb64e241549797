"""Random streams survive a round trip through JSON."""

from __future__ import annotations

import json
import random

import numpy as np
import torch

from training.random_state import RandomState, derive, seed_everything

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), *np.random.normal(size=3), *torch.randn(3).tolist()]


def test_drawing_goes_on_exactly_after_json() -> None:
    seed_everything(5)
    draw()  # leaves half a pair of Gaussians behind in Python and NumPy
    kept = json.dumps(RandomState.capture(CPU).to_json())
    expected = [draw() for _ in range(3)]
    seed_everything(6)
    RandomState.from_json(json.loads(kept)).restore(CPU)
    assert [draw() for _ in range(3)] == expected


def test_derived_seeds_differ_by_purpose_and_fit_torch() -> None:
    seeds = {derive(seed, word, n) for seed in (0, 1) for word in ("shard", "epoch") for n in range(10)}
    assert len(seeds) == 40
    assert all(0 <= seed < 2**63 for seed in seeds)
