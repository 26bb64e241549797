"""Saves of a running training: when they are due, what they carry beside the tensors, what is told about them.

Not covered: how a checkpoint is stored (checkpoint.py), how often it is wanted (cadence.py).
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from training.cadence import grace_fit
from training.interruption import LEAVE_WITHIN
from training.random_state import RandomState
from training.session import Training


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
    told = {"stall": stall, "durable": durable, "cost": cadence.cost}
    told |= {"interval": cadence.interval, "mtbf": cadence.mtbf}
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
