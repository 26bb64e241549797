"""Everything the training loop works with, built from the spec and, after an interruption, from a checkpoint.

Not covered: taking steps (train.py), storing (checkpoint.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.cadence import Cadence, observed_mtbf
from training.checkpoint import Checkpointer, CheckpointInfo
from training.dataset import Sampler, shards_of
from training.interruption import Interruption
from training.model import UserModule, load_module
from training.progress import Progress
from training.random_state import RandomState, derive, seed_everything
from training.reduction import OrderedSum
from training.sharded import ShardedSum, shard_model
from training.spec import BadSpec, TrainSpec
from training.tracking import MetricLog
from training.workers import Workers

DECIDES_WEIGHTS = ("epochs", "batch_size", "accumulate", "seed", "precision", "compile", "deterministic", "parallel")
EXTRAS = 3  # numbers that ride along with the gradients: loss, save, stop


@dataclass(kw_only=True)
class Training:
    """Everything the loop works with."""

    spec: TrainSpec
    user: UserModule
    workers: Workers
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    state: dict[str, Any]  # what the checkpointer copies tensors and values from, and into
    data: Any
    sampler: Sampler
    sums: OrderedSum | ShardedSum
    checkpointer: Checkpointer
    interruption: Interruption
    cadence: Cadence
    progress: Progress
    metrics: MetricLog | None
    streams: dict[int, RandomState]  # of this rank's shards
    orders: dict[int, str]  # digest of the sample order of this rank's shards
    step: int = 0  # finished steps
    loss: float | None = None  # of the last step
    seconds: float = 0.0  # over all attempts, up to `since`
    since: float = 0.0  # monotonic
    attempts: int = 1
    complete: bool = False  # the checkpoint that was loaded is the last one
    saving: int | None = None  # the step of the save that is not known to be durable
    step_seconds: float = 0.0  # the last step
    data_seconds: float = 0.0  # of it, fetching samples
    warned: bool = False

    @property
    def sharded(self) -> bool:
        """Whether each worker holds only its part of the model."""
        return isinstance(self.sums, ShardedSum)

    @property
    def max_steps(self) -> int:
        """Steps of the whole training."""
        return self.spec.epochs * self.sampler.steps_per_epoch


def identity(spec: TrainSpec) -> dict[str, str]:
    """Digests that a checkpoint must share with the training that resumes from it."""
    deciding = {name: getattr(spec, name) for name in DECIDES_WEIGHTS} | {"params": spec.params}
    config = hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()
    return {"code": spec.code_digest, "config": config, "data": spec.data_digest}


def set_up(
    spec: TrainSpec, workers: Workers, interruption: Interruption, progress: Progress
) -> tuple[Training, CheckpointInfo | None]:
    """Build all parts and read the newest good checkpoint into them. Raises BadSpec, BadModule, NoGoodCheckpoint."""
    user = load_module(spec.module)
    seed_everything(derive(spec.seed, "model"))
    model = user.build_model(spec.params)
    if sharded := spec.parallel == "fsdp" and workers.world > 1:
        shard_model(model)  # block by block onto the device, which the whole may not fit
    else:
        model.to(workers.device)
    optimizer = user.build_optimizer(model, spec.params)
    data = user.load_split(Path(spec.data), spec.train_split, spec.params)
    sampler = make_sampler(spec, len(data), spec.shards or workers.world)  # type: ignore[arg-type]
    scheduler = user.build_scheduler(optimizer, spec.params, spec.epochs * sampler.steps_per_epoch)
    checkpointer = Checkpointer(
        spec.checkpoints,
        keep=spec.checkpoint.keep,
        rank=workers.rank,
        world=workers.world,
        group=workers.group,
        identity=identity(spec),
    )
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    state = {name: part for name, part in parts.items() if part is not None}
    resumed = checkpointer.load(state)
    shards = choose_shards(spec, workers, resumed)
    streams, orders = take_shards(spec, workers, shards, resumed)
    kind = ShardedSum if sharded else OrderedSum
    training = Training(
        spec=spec,
        user=user,
        workers=workers,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        state=state,
        data=data,
        sampler=make_sampler(spec, sampler.samples, shards),
        sums=kind(model, shards=shards, rank=workers.rank, world=workers.world, extras=EXTRAS),
        checkpointer=checkpointer,
        interruption=interruption,
        cadence=Cadence(policy=spec.checkpoint, mtbf=spec.checkpoint.mtbf_seconds, last_save=time.monotonic()),
        progress=progress,
        metrics=None,
        streams=streams,
        orders=orders,
    )
    if resumed is not None:
        training.step, training.seconds = resumed.step, resumed.meta["seconds"]
        training.attempts, training.complete = resumed.meta["attempts"] + 1, resumed.complete
        training.cadence.mtbf = observed_mtbf(
            spec.checkpoint.mtbf_seconds, training.seconds, interruptions=training.attempts - 1
        )
    if spec.mlflow_run and workers.rank == 0:
        tail = resumed.meta["unsent_metrics"] if resumed else ()
        training.metrics = MetricLog(
            spec.mlflow_uri, spec.mlflow_run, tail=tail, problem=lambda told: progress.event("metrics", problem=told)
        )
    return training, resumed


def make_sampler(spec: TrainSpec, samples: int, shards: int) -> Sampler:
    """The order of samples of that spec."""
    return Sampler(
        samples=samples, batch_size=spec.batch_size, shards=shards, accumulate=spec.accumulate, seed=spec.seed
    )


def choose_shards(spec: TrainSpec, workers: Workers, resumed: CheckpointInfo | None) -> int:
    """The number of shards: the checkpoint's, the spec's, or one for each worker.

    Raises BadSpec when the workers do not fit the shards; without `deterministic` the shards are cut anew instead.
    """
    shards = int(resumed.meta["shards"]) if resumed else spec.shards or workers.world
    whole = spec.parallel == "fsdp" and workers.world > 1  # a sharded model has one data shard for each worker
    if workers.world > shards or (whole and workers.world != shards):
        if spec.deterministic:
            told = "parallel = fsdp needs exactly one worker for each shard" if whole else "at most one for each shard"
            raise BadSpec(
                f"{workers.world} workers, but the training has {shards} shards ({told}): start {shards} workers, set "
                f"[train] shards to the most workers it will ever have, or set deterministic = false"
            )
        return workers.world
    return shards


def take_shards(
    spec: TrainSpec, workers: Workers, shards: int, resumed: CheckpointInfo | None
) -> tuple[dict[int, RandomState], dict[int, str]]:
    """The random stream and the digest of the sample order of each of this rank's shards, fresh or continued."""
    saved: dict[int, Any] = {}
    if resumed is not None and int(resumed.meta["shards"]) == shards:
        saved = {int(shard): kept for rank in resumed.per_rank for shard, kept in rank["shards"].items()}
    mine = shards_of(workers.rank, workers.world, shards)
    streams, orders = {}, {}
    for shard in mine:
        if shard in saved:
            streams[shard], orders[shard] = RandomState.from_json(saved[shard]["random"]), saved[shard]["order"]
        else:
            seed_everything(derive(spec.seed, "shard", shard, *((resumed.step,) if resumed else ())))
            streams[shard], orders[shard] = RandomState.capture(workers.device), ""
    if len(mine) == 1:  # the usual case: the process's generators are the shard's, and are never swapped
        streams[mine[0]].restore(workers.device)
    return streams, orders
