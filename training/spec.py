"""The contract between whoever asks for a training and the trainer: what to train, what came out, exit codes.

Standard library only, because it is imported in pods without torch. The JSON of a `TrainSpec` is all that a trainer is
given. Not covered: where it runs (deployments), in which order (flows).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

EXIT_COMPLETE = 0  # the checkpoint's manifest says step == max_steps, and the weights are exported
EXIT_USER_ERROR = 1  # a bug in the model or the data; 1..127 spends the error budget
EXIT_BAD_SPEC = 2
EXIT_NO_GOOD_CHECKPOINT = 5  # every checkpoint is damaged: stop, never start at 0 in silence
EXIT_INTERRUPTED = 143  # the platform took us: resume


class BadSpec(ValueError):
    """The spec cannot be trained as it is: the message names the key, what was found and what was expected."""


@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """When to save, and what is kept. The interval follows Young/Daly between the bounds."""

    min_seconds: float = 5.0
    max_seconds: float = 600.0
    every_steps: int = 0  # 0: by time; N: exactly every N steps (tests, demos)
    keep: int = 2  # >= 2: a damaged newest one needs a predecessor
    mtbf_seconds: float = 3600.0  # first guess of the time between interruptions; the ledger corrects it
    notice_seconds: float = 120.0  # what the platform gives between notice and the end


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """Everything that decides the weights, and where things are. Paths are absolute; folders or fsspec URLs."""

    key: str  # the step key: names the training everywhere
    pipeline: str
    module: str  # the user's Python file: build_model, load_split, ... (see training/model.py)
    data: str  # folder with the pulled data
    train_split: str = "train"
    heldout_split: str = "heldout"
    checkpoints: str  # store URL (file:// or s3://) of this training's checkpoints
    output: str  # folder for model.safetensors, heldout.jsonl, metrics.json, result.json
    epochs: int = 1
    batch_size: int = 32  # global: over all workers, whatever their number
    accumulate: int = 1  # gradient accumulation: micro batches per optimizer step
    seed: int = 0
    shards: int = 0  # virtual shards; 0: one per worker of the first attempt. Fixed shards make elastic resume exact
    precision: str = "float32"  # or bfloat16: autocast
    compile: bool = False
    deterministic: bool = True
    parallel: str = "ddp"  # or fsdp
    threads: int = 1  # intra-op threads per worker: part of bit identity
    params: dict[str, Any] = field(default_factory=dict)  # the user's own: learning_rate, width, ...
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    samples: int = 1000  # held-out requests written to heldout.jsonl with the model's answers, at most
    code_digest: str = ""
    data_digest: str = ""
    mlflow_uri: str = ""  # empty: no metrics server
    mlflow_run: str = ""  # the one MLflow run of this training, through all attempts
    progress: str = ""  # file that rank 0 appends JSON lines to: {"step", "loss", "data_seconds", "time", ...}
    attempt: int = 1
    profile: bool = False  # record some steps with torch.profiler: output/profile; the weights are the same

    def to_json(self) -> str:
        """The spec as JSON, sorted, for a file."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TrainSpec:
        """Read a spec; raises BadSpec that names an unknown or a missing key."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadSpec(f"train spec: not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise BadSpec(f"train spec: expected an object, got {type(raw).__name__}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise BadSpec(f"train spec: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}")
        try:
            raw["checkpoint"] = CheckpointPolicy(**raw.get("checkpoint", {}))
            return cls(**raw)
        except TypeError as error:
            raise BadSpec(f"train spec: {error}") from error


def read_spec(path: str | Path) -> TrainSpec:
    """The spec in that file. Raises BadSpec, also when it cannot be read."""
    try:
        return TrainSpec.from_json(Path(path).read_text())
    except OSError as error:
        raise BadSpec(f"train spec {path}: {error.strerror or error}") from error


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a complete training left behind. Written to output/result.json, last."""

    key: str
    step: int
    max_steps: int
    epoch: int
    samples_seen: int
    metrics: dict[str, float]  # on the held-out split: loss and the user's metrics
    weights: str  # path or URL of model.safetensors
    weights_sha256: str
    heldout: str  # path or URL of heldout.jsonl
    parameters: int  # count
    seconds: float  # training time over all attempts
    optimizer_sha256: str = ""  # of the optimizer's final state: what a proof of exact resume compares
    order_sha256: str = ""  # of every sample index in the order in which each shard consumed it
    attempts: int = 1  # launches that took part, as the checkpoints counted them

    @classmethod
    def read(cls, path: str | Path) -> TrainResult:
        """The result of a complete training; raises FileNotFoundError while there is none."""
        return cls(**json.loads(Path(path).read_text()))
