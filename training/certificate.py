"""The certificate of a proof of exact resume: what was trained, which kills it went through, which hashes came out.

Register attaches it to the model version, and a gate may ask for it. Its own sha256 covers all other fields.
Not covered: the trainings (training/verify_resume.py).
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from importlib.metadata import version
from typing import Any

from training.spec import TrainResult, TrainSpec

HASHES = ("weights_sha256", "optimizer_sha256", "order_sha256")


def one_round(result: TrainResult, kills: list[dict[str, Any]]) -> dict[str, Any]:
    """One interrupted training: its kills, and the hashes that it ended with."""
    return {"kills": kills, "attempts": result.attempts, **_hashes(result)}


def certify(
    spec: TrainSpec,
    *,
    whole: TrainResult,
    rounds: list[dict[str, Any]],
    seed: int,
    processes: int,
    shards: int,
    elastic: bool,
    seconds: float,
) -> dict[str, Any]:
    """The certificate, `equal` or not. `whole` is the uninterrupted training, `rounds` are those of `one_round`."""
    expected = _hashes(whole)
    certificate: dict[str, Any] = {
        "format": "reprise-resume-certificate-1",
        "equal": all(done[name] == expected[name] for done in rounds for name in HASHES),
        "key": spec.key,
        "code_digest": spec.code_digest,
        "data_digest": spec.data_digest,
        "seed": seed,
        "processes": processes,
        "shards": shards,
        "elastic": elastic,
        "steps": whole.max_steps,
        "kills": sum(len(done["kills"]) for done in rounds),
        "uninterrupted": expected,
        "interrupted": rounds,
        "python": platform.python_version(),
        "torch": version("torch"),
        "machine": platform.machine(),
        "created": time.time(),
        "seconds": round(seconds, 1),
    }
    sealed = json.dumps(certificate, sort_keys=True).encode()
    return {**certificate, "sha256": hashlib.sha256(sealed).hexdigest()}


def _hashes(result: TrainResult) -> dict[str, str]:
    return {name: getattr(result, name) for name in HASHES}
