"""Held-out evaluation of given weights: metrics.json and heldout.jsonl, alike for every version on the same data.

The trainer calls `evaluate` at completion; as a program it evaluates another version's weights on this training's data:
`python -m training.evaluate --spec spec.json --weights model.safetensors --output FOLDER`.
Not covered: whether the figures are good enough (the register step's gate).
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # before the other imports: the first process of a pod hears only what it has a handler for
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))

import argparse
import base64
import hashlib
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from training.dataset import fetch
from training.model import BadModule, UserModule, load_module
from training.spec import EXIT_BAD_SPEC, TrainSpec, read_spec

BATCH = 256


def evaluate(spec: TrainSpec, user: UserModule, model: torch.nn.Module, output: Path | None) -> dict[str, float]:
    """Loss and the user's metrics over the whole held-out split, and the model's answers to held-out requests.

    Writes metrics.json ({"loss", ..., "samples"}) and heldout.jsonl (one {"name", "body_b64", "label", "answer"} a
    line, at most spec.samples) into `output`; without one nothing, for the other workers of a sharded model, which
    takes all of them at every batch. The model is left in evaluation mode.
    """
    device = next(model.parameters()).device
    model.eval()
    data = user.load_split(Path(spec.data), spec.heldout_split, spec.params)
    count = len(data)  # type: ignore[arg-type]
    if not count:
        raise BadModule(f"{user.path}: load_split(..., {spec.heldout_split!r}, ...) is empty: nothing to evaluate on")
    outputs, targets, total = [], [], 0.0
    with torch.inference_mode():
        for first in range(0, count, BATCH):
            inputs, target = fetch(data, range(first, min(first + BATCH, count)))
            output_batch = model(to_device(inputs, device))
            target = to_device(target, device)
            total += float(user.loss(output_batch, target)) * min(BATCH, count - first)
            outputs.append(output_batch.cpu())
            targets.append(target.cpu())
    figures = user.metrics(torch.cat(outputs), torch.cat(targets))
    metrics = {"loss": total / count, **{k: float(v) for k, v in figures.items()}, "samples": float(count)}
    answers = "".join(_answers(spec, user, model, device))
    if output is None:
        return metrics
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "heldout.jsonl", answers.encode())
    document = {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}  # JSON has no NaN
    document["samples"] = count
    write_atomically(output / "metrics.json", json.dumps(document, indent=1, sort_keys=True).encode())
    return metrics


def _answers(spec: TrainSpec, user: UserModule, model: torch.nn.Module, device: torch.device) -> list[str]:
    requests = user.heldout_requests(Path(spec.data), spec.heldout_split, spec.params)
    lines: list[str] = []
    chosen = itertools.islice(requests, spec.samples)
    with torch.inference_mode():
        while batch := list(itertools.islice(chosen, BATCH)):
            outputs = model(torch.stack([user.preprocess(body) for _, body, _ in batch]).to(device)).cpu()
            for (name, body, label), row in zip(batch, outputs, strict=True):
                answer = user.postprocess(row)
                if "label" not in answer:
                    raise BadModule(f"{user.path}: postprocess returned {answer!r}; expected a dict with 'label'")
                body_b64 = base64.b64encode(body).decode()
                lines.append(json.dumps({"name": name, "body_b64": body_b64, "label": label, "answer": answer}) + "\n")
    return lines


def to_device(value: Any, device: torch.device) -> Any:
    """A batch, or a dict, list or tuple of batches, on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(v, device) for v in value)
    return value


def write_atomically(path: Path, data: bytes) -> str:
    """Write, fsync and rename; returns the sha256 of the bytes."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return hashlib.sha256(data).hexdigest()


def load_weights(user: UserModule, params: dict[str, Any], weights: Path) -> torch.nn.Module:
    """The user's model with the weights of a safetensors file. Raises BadModule when they do not fit."""
    import safetensors.torch

    model = user.build_model(params)
    try:
        safetensors.torch.load_model(model, str(weights))
    except RuntimeError as error:
        raise BadModule(f"{weights} does not fit the model of {user.path}: {error}") from error
    return model


def main(argv: list[str] | None = None) -> int:
    """The program. Exit codes: 0 done, 2 when the module or the weights cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("--spec", required=True, help="train spec whose data and module are used")
    parser.add_argument("--weights", required=True, help="model.safetensors of the version to evaluate")
    parser.add_argument("--output", required=True, help="folder for metrics.json and heldout.jsonl")
    parser.add_argument("--module", help="the version's own module file; default: the spec's")
    args = parser.parse_args(argv)
    try:
        spec = read_spec(args.spec)
        torch.set_num_threads(spec.threads)
        user = load_module(args.module or spec.module)
        metrics = evaluate(spec, user, load_weights(user, spec.params, Path(args.weights)), Path(args.output))
    except (ValueError, OSError) as error:
        print(f"training.evaluate: {error}", file=sys.stderr)
        return EXIT_BAD_SPEC
    print(json.dumps(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main())
