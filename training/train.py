"""The training loop, read top to bottom: set up, resume, train, save, finish.

Run by the wrapper (`python -m training.launch --spec spec.json`), once per worker; by hand it trains with one worker:
`python -m training.train --spec spec.json`. Whatever interrupts it, the weights that come out are those of an
uninterrupted training: order of samples, random streams and the order of every sum are functions of the spec alone.
Not covered: restarting (training/launch.py), storing (training/checkpoint.py), who may run where (deployments).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from training.checkpoint import IdentityMismatch, NoGoodCheckpoint
from training.dataset import extend_digest, fetch
from training.evaluate import to_device
from training.finish import finish
from training.interruption import LEAVE_WITHIN, Interruption, die_with_agent, end, write_status
from training.model import BadModule
from training.profile import StepProfile
from training.progress import PACE, Progress
from training.random_state import RandomState
from training.reduction import PeerLost, is_lost_peer
from training.saving import save_later, save_now, tell_saved
from training.session import Training, set_up
from training.spec import (
    EXIT_BAD_SPEC,
    EXIT_COMPLETE,
    EXIT_INTERRUPTED,
    EXIT_NO_GOOD_CHECKPOINT,
    EXIT_USER_ERROR,
    BadSpec,
    TrainSpec,
    read_spec,
)
from training.verdict import FOLDER
from training.workers import Workers, join, make_exact

METRICS_PATIENCE = 20.0  # seconds to wait at the end for a metrics server that is away
LOSS, SAVE, STOP = range(3)  # the numbers that ride along with the gradients


def train(training: Training) -> bool:
    """Take the steps that are left. True at max_steps, False after an agreed interruption; both are saved.

    Raises PeerLost when another rank is gone; then nothing is saved.
    """
    spec = training.spec
    forward = torch.compile(training.model) if spec.compile else training.model
    training.model.train()
    training.since = time.monotonic()
    profiled = spec.profile and training.workers.rank == 0
    with StepProfile(Path(spec.output) / FOLDER, training.workers.device, enabled=profiled) as profile:
        complete = steps(training, forward, profile)
    if complete and not training.complete:
        save_now(training, complete=True)
    return complete


def steps(training: Training, forward: Any, profile: StepProfile) -> bool:
    """The loop itself. False after an agreed interruption, which is saved."""
    pace, first = float(os.environ.get(PACE, "0")), True
    while training.step < training.max_steps:
        began = time.monotonic()
        saving = training.saving is not None
        due = training.cadence.due(training.step + 1, began, busy=saving)
        loss, save, stop = gradients(training, forward, profile, due=due)
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
        training.step_seconds = time.monotonic() - began
        profile.step()
        if first:  # off the path from a kill to the first new step, and off the first save
            training.checkpointer.prepare(training.state)
            first = False
        else:
            training.cadence.stepped(training.step_seconds, saving=saving or training.saving is not None)
        if pace > training.step_seconds:
            time.sleep(pace - training.step_seconds)
    return True


def gradients(training: Training, forward: Any, profile: StepProfile, *, due: bool) -> tuple[float, bool, bool]:
    """Every shard's forward and backward, summed: (loss of the global batch, all save now, all stop now)."""
    spec, device, sums = training.spec, training.workers.device, training.sums
    swap = len(sums.mine) > 1
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=spec.precision == "bfloat16")
    extras = []
    training.data_seconds = 0.0
    sums.begin_step()
    for position, shard in enumerate(sums.mine):
        if swap:
            training.streams[shard].restore(device)
        sums.begin_shard(position)
        total = torch.zeros((), device=device)
        for indices in training.sampler.micro_batches(training.step, shard):
            asked = time.perf_counter()
            with profile.part("data"):
                inputs, targets = fetch(training.data, indices)
            training.data_seconds += time.perf_counter() - asked
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
    training.progress.step(
        step=step,
        max_steps=training.max_steps,
        epoch=epoch,
        loss=loss,
        data_seconds=training.data_seconds,
        always=always,
    )
    if training.metrics is not None:
        rate = float(training.optimizer.param_groups[0]["lr"])
        training.metrics.log(step, {"train_loss": loss, "learning_rate": rate})
    tell_saved(training)


def run(spec: TrainSpec, workers: Workers) -> int:
    """One worker's training from set-up to its exit code."""
    progress = Progress(spec.progress if workers.rank == 0 else "")
    make_exact(spec, workers.device)
    interruption = Interruption(leave_within=float(os.environ.get(LEAVE_WITHIN, "25"))).install()
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
