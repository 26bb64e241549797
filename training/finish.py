"""The end of a training: weights, held-out evaluation, and result.json last, so that whoever sees it sees it all.

Interrupted here, the next attempt loads the last checkpoint and does it again. Not covered: what is done with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.evaluate import evaluate, write_atomically
from training.session import Training
from training.sharded import whole
from training.spec import TrainResult


def finish(training: Training) -> None:
    """Export the weights, evaluate, and write result.json last. Interrupted here, the next attempt does it again.

    Collective: a sharded model is evaluated by all workers together, where it lies; another one by rank 0.
    """
    training.interruption.leave_at_once()
    spec, output = training.spec, Path(training.spec.output)
    order = hashlib.sha256("".join(gather_orders(training)).encode()).hexdigest()
    optimizer = optimizer_digest(training.optimizer)
    if training.workers.rank != 0:
        if training.sharded:
            gather_weights(training)
            evaluate(spec, training.user, training.model, None)
        training.workers.wait_for_all()
        return
    output.mkdir(parents=True, exist_ok=True)
    digest = export(gather_weights(training) if training.sharded else training.model, output / "model.safetensors")
    metrics = evaluate(spec, training.user, training.model, output)
    result = TrainResult(
        key=spec.key,
        step=training.step,
        max_steps=training.max_steps,
        epoch=spec.epochs,
        samples_seen=training.step * spec.batch_size,
        metrics=metrics,
        weights=str(output / "model.safetensors"),
        weights_sha256=digest,
        heldout=str(output / "heldout.jsonl"),
        parameters=sum(p.numel() for p in training.model.parameters()),
        seconds=training.seconds + (time.monotonic() - training.since if training.since else 0.0),
        optimizer_sha256=optimizer,
        order_sha256=order,
        attempts=training.attempts,
    )
    write_atomically(output / "result.json", json.dumps(asdict(result), indent=1, sort_keys=True).encode())
    if training.metrics is not None:
        training.metrics.log(training.step, {f"heldout_{name}": value for name, value in metrics.items()})
    training.progress.event("complete", step=training.step)
    training.workers.wait_for_all()


def gather_weights(training: Training) -> torch.nn.Module:
    """A sharded model whole, in rank 0's host memory; one tensor at a time is whole on the devices. Collective."""
    keeps = training.workers.rank == 0
    kept: dict[str, torch.Tensor] = {}
    for name, value in training.model.state_dict().items():
        tensor = whole(value)
        if keeps:
            kept[name] = tensor.cpu()
    if not keeps:
        return training.model
    model = training.user.build_model(training.spec.params)
    model.load_state_dict(kept)
    return model


def export(model: torch.nn.Module, path: Path) -> str:
    """Write the weights (tied ones once) aside, make them durable, rename; returns their sha256."""
    import safetensors.torch

    aside = path.with_name(f".{path.name}.{os.getpid()}")
    safetensors.torch.save_model(model, str(aside))
    with aside.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    aside.replace(path)
    return digest


def gather_orders(training: Training) -> list[str]:
    """The sample order digests of all shards, in order, on every rank."""
    if training.workers.world == 1:
        return [training.orders[shard] for shard in sorted(training.orders)]
    parts: list[Any] = [None] * training.workers.world
    dist.all_gather_object(parts, training.orders)
    merged = {shard: digest for part in parts for shard, digest in part.items()}
    return [merged[shard] for shard in sorted(merged)]


def optimizer_digest(optimizer: torch.optim.Optimizer) -> str:
    """sha256 over the optimizer's state, parameter by parameter; collective when the model is sharded."""
    digest = hashlib.sha256()
    for index, group in enumerate(optimizer.param_groups):
        digest.update(json.dumps({k: str(v) for k, v in group.items() if k != "params"}, sort_keys=True).encode())
        for position, parameter in enumerate(group["params"]):
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                digest.update(f"{index}.{position}.{key}:".encode())
                if isinstance(value, torch.Tensor):
                    digest.update(whole(value).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                else:
                    digest.update(str(value).encode())
    return digest.hexdigest()
