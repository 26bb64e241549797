"""The training loop, read top to bottom: set up, resume, train, save, finish.

Run by the wrapper (`python -m training.launch --spec spec.json`), once per worker; by hand it trains with one worker:
`python -m training.train --spec spec.json`. Whatever interrupts it, the weights that come out are those of an
uninterrupted training: order of samples, random streams and the order of every sum are functions of the spec alone.
Not covered: restarting (training/launch.py), storing (training/checkpoint.py), who may run where (deployments).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.cadence import Cadence, grace_fit, observed_mtbf
from training.checkpoint import Checkpointer, CheckpointInfo, IdentityMismatch, NoGoodCheckpoint
from training.dataset import Sampler, extend_digest, fetch, shards_of
from training.evaluate import evaluate, to_device, write_atomically
from training.interruption import LAUNCHER, LEAVE_WITHIN, Interruption, die_with_agent, end, write_status
from training.light_start import use_light_optimizers
from training.model import BadModule, UserModule, load_module
from training.progress import Progress
from training.random_state import RandomState, derive, seed_everything
from training.reduction import OrderedSum, PeerLost, is_lost_peer
from training.spec import (
    EXIT_BAD_SPEC,
    EXIT_COMPLETE,
    EXIT_INTERRUPTED,
    EXIT_NO_GOOD_CHECKPOINT,
    EXIT_USER_ERROR,
    BadSpec,
    TrainResult,
    TrainSpec,
    read_spec,
)
from training.tracking import MetricLog

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)  # a rank that hangs; one that died is noticed at once
PACE = "REPRISE_PACE"  # environment variable: least seconds of a step, for proofs that aim at moments of it
METRICS_PATIENCE = 20.0  # seconds to wait at the end for a metrics server that is away
DECIDES_WEIGHTS = ("epochs", "batch_size", "accumulate", "seed", "precision", "compile", "deterministic", "parallel")
LOSS, SAVE, STOP = range(3)  # the numbers that ride along with the gradients


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process's place among the workers of the training."""

    rank: int
    world: int
    device: torch.device
    group: Any = None  # a gloo group of its own for checkpoints, whose collectives run beside the loop's


@dataclass(kw_only=True)
class Training:
    """Everything the loop works with."""

    spec: TrainSpec
    user: UserModule
    workers: Workers
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    data: Any
    sampler: Sampler
    sums: OrderedSum
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
    warned: bool = False

    @property
    def max_steps(self) -> int:
        """Steps of the whole training."""
        return self.spec.epochs * self.sampler.steps_per_epoch

    @property
    def state(self) -> dict[str, Any]:
        """What the checkpointer copies tensors and values from, and into."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: part for name, part in parts.items() if part is not None}


# ------------------------------------------------------------------------------------------------ set up


@contextlib.contextmanager
def join() -> Iterator[Workers]:
    """Find the other workers (torchrun's environment) and leave them in order at the end."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world == 1:
        yield Workers(rank=rank, world=world, device=device)
        return
    # two ranks on one GPU are possible with gloo only
    alone = device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
    dist.init_process_group("nccl" if alone and dist.is_nccl_available() else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        yield Workers(rank=rank, world=world, device=device, group=group)
    finally:  # without it an interpreter's end may abort, which reads like a crash
        dist.destroy_process_group()


def make_exact(spec: TrainSpec, device: torch.device) -> None:
    """Threads and kernels whose results do not depend on the moment."""
    torch.set_num_threads(spec.threads)
    if not spec.compile:
        use_light_optimizers()
    if spec.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def identity(spec: TrainSpec) -> dict[str, str]:
    """Digests that a checkpoint must share with the training that resumes from it."""
    deciding = {name: getattr(spec, name) for name in DECIDES_WEIGHTS} | {"params": spec.params}
    config = hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()
    return {"code": spec.code_digest, "config": config, "data": spec.data_digest}


def set_up(
    spec: TrainSpec, workers: Workers, interruption: Interruption, progress: Progress
) -> tuple[Training, CheckpointInfo | None]:
    """Build all parts and read the newest good checkpoint into them."""
    user = load_module(spec.module)
    seed_everything(derive(spec.seed, "model"))
    model = user.build_model(spec.params).to(workers.device)
    optimizer = user.build_optimizer(model, spec.params)
    data = user.load_split(Path(spec.data), spec.train_split, spec.params)
    checkpointer = Checkpointer(
        spec.checkpoints,
        keep=spec.checkpoint.keep,
        rank=workers.rank,
        world=workers.world,
        group=workers.group,
        identity=identity(spec),
    )
    known = spec.shards or workers.world
    sampler = Sampler(
        samples=len(data),  # type: ignore[arg-type]
        batch_size=spec.batch_size,
        shards=known,
        accumulate=spec.accumulate,
        seed=spec.seed,
    )
    scheduler = user.build_scheduler(optimizer, spec.params, spec.epochs * sampler.steps_per_epoch)
    training = Training(
        spec=spec,
        user=user,
        workers=workers,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        data=data,
        sampler=sampler,
        sums=OrderedSum(model, shards=1, rank=0, world=1, extras=0),
        checkpointer=checkpointer,
        interruption=interruption,
        cadence=Cadence(policy=spec.checkpoint, mtbf=spec.checkpoint.mtbf_seconds, last_save=time.monotonic()),
        progress=progress,
        metrics=None,
        streams={},
        orders={},
    )
    resumed = checkpointer.load(training.state)
    take_shards(training, resumed)
    if spec.mlflow_run and workers.rank == 0:
        tail = resumed.meta["unsent_metrics"] if resumed else ()
        training.metrics = MetricLog(
            spec.mlflow_uri, spec.mlflow_run, tail=tail, problem=lambda told: progress.event("metrics", problem=told)
        )
    return training, resumed


def take_shards(training: Training, resumed: CheckpointInfo | None) -> None:
    """Give each shard its random stream and sample position: fresh ones, or those of the checkpoint."""
    spec, workers, old = training.spec, training.workers, training.sampler
    shards = int(resumed.meta["shards"]) if resumed else old.shards
    mine = shards_of(workers.rank, workers.world, shards)
    training.sampler = Sampler(
        samples=old.samples, batch_size=old.batch_size, shards=shards, accumulate=old.accumulate, seed=old.seed
    )
    training.sums = OrderedSum(training.model, shards=shards, rank=workers.rank, world=workers.world, extras=3)
    if resumed is None:
        for shard in mine:
            seed_everything(derive(spec.seed, "shard", shard))
            training.streams[shard] = RandomState.capture(workers.device)
            training.orders[shard] = ""
    else:
        saved = {int(shard): kept for rank in resumed.per_rank for shard, kept in rank["shards"].items()}
        for shard in mine:
            training.streams[shard] = RandomState.from_json(saved[shard]["random"])
            training.orders[shard] = saved[shard]["order"]
        meta = resumed.meta
        training.step, training.seconds, training.attempts = resumed.step, meta["seconds"], meta["attempts"] + 1
        training.complete = training.step == training.max_steps
        training.cadence.mtbf = observed_mtbf(
            spec.checkpoint.mtbf_seconds, training.seconds, interruptions=training.attempts - 1
        )
    if len(mine) == 1:  # the usual case: the process's generators are the shard's, and are never swapped
        training.streams[mine[0]].restore(workers.device)


# ------------------------------------------------------------------------------------------------ train


def train(training: Training) -> bool:
    """Take the steps that are left. True at max_steps, False after an agreed interruption; both are saved.

    Raises PeerLost when another rank is gone; then nothing is saved.
    """
    spec = training.spec
    forward = torch.compile(training.model) if spec.compile else training.model
    training.model.train()
    training.since = time.monotonic()
    pace, first = float(os.environ.get(PACE, "0")), True
    while training.step < training.max_steps:
        began = time.monotonic()
        due = training.cadence.due(training.step + 1, began, busy=training.saving is not None)
        loss, save, stop = gradients(training, forward, due=due)
        training.checkpointer.wait_staged()  # the copy of the weights that are about to change
        training.optimizer.step()
        if training.scheduler is not None:
            training.scheduler.step()
        training.step, training.loss = training.step + 1, loss
        tell(training, always=stop)
        if training.step == training.max_steps:
            break
        if stop:
            save_now(training, complete=False)
            return False
        if save:
            save_later(training)
        if first:  # off the path from a kill to the first new step, and off the first save
            training.checkpointer.prepare(training.state)
            first = False
        training.step_seconds = time.monotonic() - began
        if pace > training.step_seconds:
            time.sleep(pace - training.step_seconds)
    if not training.complete:
        save_now(training, complete=True)
    return True


def gradients(training: Training, forward: Any, *, due: bool) -> tuple[float, bool, bool]:
    """Every shard's forward and backward, summed: (loss of the global batch, all save now, all stop now)."""
    spec, device, sums = training.spec, training.workers.device, training.sums
    swap = len(sums.mine) > 1
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=spec.precision == "bfloat16")
    extras = []
    sums.begin_step()
    for position, shard in enumerate(sums.mine):
        if swap:
            training.streams[shard].restore(device)
        sums.begin_shard(position)
        total = torch.zeros((), device=device)
        for indices in training.sampler.micro_batches(training.step, shard):
            inputs, targets = fetch(training.data, indices)
            with autocast:
                loss = training.user.loss(forward(to_device(inputs, device)), to_device(targets, device))
            part = loss * (len(indices) / spec.batch_size)
            part.backward()  # type: ignore[no-untyped-call]
            total += part.detach()
            training.orders[shard] = extend_digest(training.orders[shard], indices)
        sums.end_shard(position)
        if swap:
            training.streams[shard] = RandomState.capture(device)
        extras.append([float(total), 0.0, 0.0])
    # each rank says once whether it wants to save (rank 0's clock decides) or was told to leave (any rank)
    extras[0][SAVE] = float(due and training.workers.rank == 0)
    extras[0][STOP] = float(training.interruption.noticed)
    told = sums.finish(extras)
    return told[LOSS], told[SAVE] > 0, told[STOP] > 0


def tell(training: Training, *, always: bool) -> None:
    """Progress and metrics of the step that was just taken."""
    step, loss, epoch = training.step, training.loss or 0.0, training.sampler.epoch(training.step - 1)
    training.progress.step(step=step, max_steps=training.max_steps, epoch=epoch, loss=loss, always=always)
    if training.metrics is not None:
        rate = float(training.optimizer.param_groups[0]["lr"])
        training.metrics.log(step, {"train_loss": loss, "learning_rate": rate})
    tell_saved(training)


# ------------------------------------------------------------------------------------------------ save


def contents(training: Training) -> tuple[dict[str, Any], dict[str, Any]]:
    """What goes into a checkpoint beside the tensors: readable metadata, and this rank's part."""
    spec, step = training.spec, training.step
    if len(training.sums.mine) == 1:
        training.streams[training.sums.mine[0]] = RandomState.capture(training.workers.device)
    meta = {
        "key": spec.key,
        "max_steps": training.max_steps,
        "epoch": training.sampler.epoch(max(step - 1, 0)),
        "samples_seen": step * spec.batch_size,
        "loss": training.loss,
        "shards": training.sampler.shards,
        "world": training.workers.world,
        "threads": spec.threads,
        "device": training.workers.device.type,
        "torch": torch.__version__,
        "seconds": training.seconds + time.monotonic() - training.since,
        "attempts": training.attempts,
        "unsent_metrics": training.metrics.unsent() if training.metrics is not None else [],
    }
    shards = {
        str(shard): {"random": training.streams[shard].to_json(), "order": training.orders[shard]}
        for shard in training.sums.mine
    }
    return meta, {"shards": shards}


def save_later(training: Training) -> None:
    """A periodic save: the copy overlaps the next forward and backward, the writing everything."""
    tell_saved(training, wait=True)
    meta, mine = contents(training)
    training.saving = training.step
    training.progress.event("saving", step=training.step)
    training.checkpointer.save(training.step, training.state, meta=meta, per_rank=mine)
    training.cadence.last_save = time.monotonic()


def tell_saved(training: Training, *, wait: bool = False) -> None:
    """Once the save on its way is durable: measure it, tell it, and warn when it will not fit in a notice."""
    checkpointer, cadence = training.checkpointer, training.cadence
    if training.saving is None or (checkpointer.busy and not wait):
        return
    checkpointer.wait_durable()
    stall, durable = checkpointer.stall_seconds[-1], checkpointer.durable_seconds[-1]
    cadence.measured(stall=stall, durable=durable)
    told = {"stall": stall, "durable": durable, "interval": cadence.interval, "mtbf": cadence.mtbf}
    training.progress.event("checkpoint", step=training.saving, **told)
    training.saving = None
    grace = float(os.environ.get(LEAVE_WITHIN, "25"))
    notice = training.spec.checkpoint.notice_seconds
    if not training.warned and (warning := grace_fit(cadence.saves, training.step_seconds, notice=notice, grace=grace)):
        training.warned = True
        training.progress.event("warning", message=warning)
        print(f"training: {warning}", file=sys.stderr, flush=True)


def save_now(training: Training, *, complete: bool) -> None:
    """The save of an agreed interruption, or the last one: durable when it returns."""
    tell_saved(training, wait=True)
    meta, mine = contents(training)
    training.saving = training.step
    training.progress.event("saving", step=training.step)
    training.checkpointer.save(
        training.step, training.state, meta=meta, per_rank=mine, complete=complete, blocking=True
    )
    tell_saved(training, wait=True)
    if not complete:
        noticed = training.interruption.noticed_at
        latency = time.time() - noticed if noticed else None
        training.progress.event("saved", step=training.step, notice=noticed, seconds_after_notice=latency)


# ------------------------------------------------------------------------------------------------ finish


def finish(training: Training) -> None:
    """Export the weights, evaluate, and write result.json last. Interrupted here, the next attempt does it again."""
    import safetensors.torch

    training.interruption.leave_at_once()
    order = hashlib.sha256("".join(gather_orders(training)).encode()).hexdigest()
    if training.workers.rank != 0:
        return
    spec, output = training.spec, Path(training.spec.output)
    output.mkdir(parents=True, exist_ok=True)
    aside = output / f".model.safetensors.{os.getpid()}"
    safetensors.torch.save_model(training.model, str(aside))
    weights = aside.read_bytes()
    aside.unlink()
    digest = write_atomically(output / "model.safetensors", weights)
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
        optimizer_sha256=optimizer_digest(training.optimizer),
        order_sha256=order,
        attempts=training.attempts,
    )
    write_atomically(output / "result.json", json.dumps(asdict(result), indent=1, sort_keys=True).encode())
    if training.metrics is not None:
        training.metrics.log(training.step, {f"heldout_{name}": value for name, value in metrics.items()})
    training.progress.event("complete", step=training.step)


def gather_orders(training: Training) -> list[str]:
    """The sample order digests of all shards, in order, on every rank."""
    if training.workers.world == 1:
        return [training.orders[shard] for shard in sorted(training.orders)]
    parts: list[Any] = [None] * training.workers.world
    dist.all_gather_object(parts, training.orders)
    merged = {shard: digest for part in parts for shard, digest in part.items()}
    return [merged[shard] for shard in sorted(merged)]


def optimizer_digest(optimizer: torch.optim.Optimizer) -> str:
    """sha256 over the optimizer's state, parameter by parameter."""
    whole = hashlib.sha256()
    for index, group in enumerate(optimizer.param_groups):
        whole.update(json.dumps({k: str(v) for k, v in group.items() if k != "params"}, sort_keys=True).encode())
        for position, parameter in enumerate(group["params"]):
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                whole.update(f"{index}.{position}.{key}:".encode())
                if isinstance(value, torch.Tensor):
                    whole.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                else:
                    whole.update(str(value).encode())
    return whole.hexdigest()


# ------------------------------------------------------------------------------------------------ the program


def run(spec: TrainSpec, workers: Workers) -> int:
    """One worker's training from set-up to its exit code."""
    progress = Progress(spec.progress if workers.rank == 0 else "")
    make_exact(spec, workers.device)
    interruption = Interruption(leave_within=float(os.environ.get(LEAVE_WITHIN, "25"))).install()
    if os.environ.get(LAUNCHER):
        Progress(spec.progress).event("worker", rank=workers.rank, pid=os.getpid())
    training: Training | None = None
    try:
        training, resumed = set_up(spec, workers, interruption, progress)
        if resumed:
            progress.event("resumed", step=training.step, max_steps=training.max_steps, attempts=training.attempts)
        if not train(training):
            write_status(EXIT_INTERRUPTED, "notice")
            return EXIT_INTERRUPTED
        finish(training)
    except Exception as error:
        if workers.world > 1:  # no clean-up: it would wait for ranks that are gone or wait for this one
            send_metrics(training, progress, patience=2.0)
            end(*explain(error))
        raise
    else:
        training.checkpointer.close()
    finally:
        send_metrics(training, progress, patience=2.0 if interruption.noticed else METRICS_PATIENCE)
        interruption.close()
        progress.close()
    return EXIT_COMPLETE


def send_metrics(training: Training | None, progress: Progress, *, patience: float) -> None:
    """Give the metrics that the server does not have yet a last chance."""
    if training is not None and training.metrics is not None and (left := training.metrics.close(patience)):
        progress.event("metrics", problem=f"{left} steps could not be sent to {training.spec.mlflow_uri}")


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and reason of a failure; tells it on standard error, with the traceback only where it helps."""
    if isinstance(error, PeerLost) or is_lost_peer(error):
        code, reason = EXIT_INTERRUPTED, f"peer lost: {str(error).splitlines()[0]}"
    elif isinstance(error, NoGoodCheckpoint):
        code, reason = EXIT_NO_GOOD_CHECKPOINT, str(error)
    elif isinstance(error, (BadModule, BadSpec, IdentityMismatch)):
        code, reason = EXIT_BAD_SPEC, str(error)
    else:
        traceback.print_exception(error)
        code, reason = EXIT_USER_ERROR, f"{type(error).__name__}: {error}"
    print(f"training: {reason}", file=sys.stderr, flush=True)
    return code, reason


def main(argv: list[str] | None = None) -> int:
    """The program of one worker; exit codes as in training/spec.py."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--spec", required=True, help="train spec, a JSON file")
    args = parser.parse_args(argv)
    die_with_agent()
    try:
        spec = read_spec(args.spec)
        with join() as workers:
            return run(spec, workers)
    except Exception as error:
        code, reason = explain(error)
        write_status(code, reason)
        return code


if __name__ == "__main__":
    sys.exit(main())
