"""Checkpoints that survive a kill at any moment and cost the training loop next to nothing.

`save` starts copying the state and returns; `wait_staged` is called before the optimizer changes what is being copied;
a thread hashes, writes, fsyncs and commits. torch.distributed.checkpoint's planners decide which rank writes which part
and which parts a rank needs at load: DDP replicas are written once, and FSDP2 shards load into another number of
ranks. `load` takes the newest checkpoint whose every byte is verified; damaged ones are quarantined and reported.

    python -m training.checkpoint URL [--json] [--no-hash]     list and verify the checkpoints at URL

Not covered: when to save (training/cadence.py, training/saving.py), and what a resharded rank does with other ranks'
random states: `CheckpointInfo.per_rank` gives them all.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any, cast

from training.agreement import Agreement
from training.checkpoint_audit import main, newest_complete, verify
from training.checkpoint_copy import Copying
from training.checkpoint_info import CheckpointInfo, Skipped, p95
from training.checkpoint_load import IdentityMismatch, Verified, take, verify_for
from training.checkpoint_store import CheckpointWriteError, Store, open_store
from training.checkpoint_writer import CheckpointWriter, Job
from training.manifest import DamagedCheckpoint, Manifest
from training.staging import OtherShape
from training.state_codec import frozen
from training.state_tree import FlatState, StateMismatch

__all__ = [
    "CheckpointInfo",
    "CheckpointWriteError",
    "Checkpointer",
    "IdentityMismatch",
    "Manifest",
    "NoGoodCheckpoint",
    "Skipped",
    "StateMismatch",
    "newest_complete",
    "p95",
    "verify",
]


class NoGoodCheckpoint(RuntimeError):
    """There were checkpoints and every one is damaged. Never answered by starting at step 0 in silence."""


class Checkpointer:
    """Saves and loads the checkpoints of one training. All ranks construct one and call the same methods in the same
    order. `group` must be a gloo group that nothing else uses; by default one is made. `identity` are digests (code,
    config, data) that a loaded checkpoint must match. `stall_seconds` has one entry per save: what it cost the caller;
    `durable_seconds` the time from the call to the commit."""

    def __init__(
        self,
        url: str,
        *,
        keep: int = 2,
        rank: int = 0,
        world: int = 1,
        group: Any = None,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        if keep < 2:
            raise ValueError(f"keep={keep}: at least 2 checkpoints must be kept, a damaged newest one needs another")
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} of world={world}: expected 0 <= rank < world")
        self.store: Store = open_store(url)
        self.rank, self.world = rank, world
        self.identity = dict(identity or {})
        self._agreement = Agreement(rank, world, group)
        self._writer = CheckpointWriter(self.store, self._agreement, keep, self.identity)
        self.stall_seconds = self._writer.stall_seconds
        self.durable_seconds = self._writer.durable_seconds
        # Directories of one step sort by attempt: time first, then something that no other attempt has.
        self._token = self._agreement.first(f"{time.time_ns() // 1_000_000:012x}{os.urandom(2).hex()}")
        self._count = 0
        self._copying = Copying(self._agreement)
        self._job: Job | None = None
        self._flat: FlatState | None = None  # of that job, until it is staged
        self._pending_stall: float | None = None

    # -- saving -----------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        meta: Mapping[str, Any],
        per_rank: Mapping[str, Any],
        complete: bool = False,
        blocking: bool = False,
    ) -> None:
        """Start saving and return; `blocking` returns when the copy is made (not when it is durable).

        `state` names modules, optimizers, objects with state_dict/load_state_dict, dicts; `meta` is readable JSON, the
        same on all ranks (rank 0's is kept); `per_rank` is this rank's own. Raises what an earlier save failed with."""
        started = time.perf_counter()
        self.wait_staged()
        self._raise_failure()
        told = json.dumps(meta)  # a copy, and the caller's mistake belongs to the caller's line
        flat, layout = self._copying.flatten(state, self._until_idle)
        metadata: dict[str, Any] = {"rank": self.rank, "per_rank": frozen(dict(per_rank), "per_rank")}
        if self.rank == 0:
            metadata |= {"objects": flat.objects, "aliases": flat.aliases}
        self._count += 1
        job = Job(
            step=step,
            name=self._name(step),
            complete=complete,
            metadata=metadata,
            meta_json=told,
            per_rank=dict(per_rank),
            layout=layout,
            started=started,
            durable=Future(),
        )
        self._start(job, flat)
        self._pending_stall = time.perf_counter() - started
        if blocking:
            self.wait_staged()

    def _start(self, job: Job, flat: FlatState) -> None:
        self._job, self._flat = job, flat
        # last, because it wakes the thread that copies
        job.snapshot.set_result(self._copying.start(flat, partial(self._writer.write, job)))

    def _start_anew(self) -> None:
        """The plan did not fit after all: parameters have taken another shape or type in place (`module.half()`) since
        the save before, which only the copying thread looks at. They have not changed since the call of `save`."""
        job, flat = self._job, self._flat
        assert job is not None and flat is not None
        self._until_idle()
        with contextlib.suppress(ValueError):
            self._writer.failures.remove(cast(BaseException, job.durable.exception()))
        layout = self._copying.plan_anew(flat, self._until_idle)
        self._count += 1
        job = replace(
            job, name=self._name(job.step), layout=layout, durable=Future(), snapshot=Future(), awaited=Event()
        )
        self._start(job, flat)
        job.snapshot.result().wait()

    def _name(self, step: int) -> str:
        return f"step-{step:010d}-{self._token}-{self._count:04d}"

    def wait_staged(self) -> float:
        """Wait until the state may change. Returns the seconds that the last save has stalled the caller: the call
        of `save` and this wait; 0.0 when nothing is being staged."""
        if self._pending_stall is None or self._job is None:
            return 0.0
        stall, self._pending_stall = self._pending_stall, None
        started = time.perf_counter()
        try:
            self._job.snapshot.result().wait()
        except OtherShape:
            self._start_anew()
        self._flat = None
        stall += time.perf_counter() - started
        self.stall_seconds.append(stall)
        self._job.stall_index = len(self.stall_seconds) - 1
        return stall

    def wait_durable(self) -> CheckpointInfo | None:
        """Wait until the last save is committed, or raise what it or one before it failed with (once). None when
        nothing was saved."""
        self.wait_staged()
        self._until_idle()
        job = self._job
        self._raise_failure()
        return job.durable.result() if job is not None else None

    @property
    def busy(self) -> bool:
        """A save is not durable yet; another one would wait for it."""
        return self._job is not None and not self._job.durable.done()

    def close(self) -> None:
        """Finish what was started, stop the threads. Raises what the last save failed with."""
        try:
            self.wait_durable()
        finally:
            self._writer.close()
            self._copying.close()

    def _raise_failure(self) -> None:
        if self._writer.failures:
            if self._job is not None and self._job.durable.done() and self._job.durable.exception():
                self._job = None
            raise self._writer.failures.popleft()

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Plan and allocate now what the first save would plan and allocate. Collective; call it when the optimizer
        has its state (after a load, or after the first step)."""
        self._copying.flatten(state, self._until_idle)

    def _until_idle(self) -> None:
        if self._job is not None:
            self._job.awaited.set()
            wait([self._job.durable])

    # -- loading ----------------------------------------------------------------------------------------------------

    def load(self, state: Mapping[str, Any]) -> CheckpointInfo | None:
        """Put the newest verified checkpoint into `state`; None only when there has never been one.

        Damaged ones are quarantined and told in `skipped`. Raises NoGoodCheckpoint when all are damaged,
        IdentityMismatch for other code, config or data, StateMismatch for another model."""
        if self.rank == 0:
            self.store.sweep(self._token)
        skipped: list[Skipped] = []
        for name in self._agreement.first(self.store.names()):
            found, damage, refusal = None, None, None
            try:
                found = verify_for(self.store, name, state, self.identity, self.rank, self.world)
            except DamagedCheckpoint as error:
                damage = str(error)
            except Exception as error:  # raised once the other ranks know, or they would wait for this one
                refusal = error
            outcomes = self._agreement.gather(
                f"verified {name}", (damage, refusal and f"{type(refusal).__name__}: {refusal}")
            )
            if refusal is not None:
                raise refusal
            if refused := [text for _, text in outcomes if text]:
                raise RuntimeError(f"another rank could not load {self.store.url}/{name}: {refused[0]}")
            reasons = [text for text, _ in outcomes]
            if found is not None and not any(reasons):
                return self._taken(name, found, state, tuple(skipped))
            told = "; ".join(sorted({r for r in reasons if r}))
            moved = self._agreement.first(self.store.quarantine(name, told) if self.rank == 0 else None)
            skipped.append(Skipped(name=name, reason=told, moved_to=moved))
        held = self._agreement.first(self.store.quarantined())
        if not skipped and not held:
            return None
        reasons = [f"{s.name}: {s.reason}" for s in skipped] or [f"{name}: quarantined earlier" for name in held]
        raise NoGoodCheckpoint(
            f"{self.store.url}: every checkpoint is damaged ({'; '.join(reasons)}). Nothing was loaded. "
            "Repair one under quarantine/, or choose a new store URL to train from the start"
        )

    def _taken(
        self, name: str, found: Verified, state: Mapping[str, Any], skipped: tuple[Skipped, ...]
    ) -> CheckpointInfo:
        per_rank, manifest = take(found, state), found.manifest
        return CheckpointInfo(
            step=manifest.step,
            complete=manifest.complete,
            world=manifest.world,
            name=name,
            url=f"{self.store.url}/{name}",
            meta=manifest.meta,
            manifest=manifest,
            per_rank=per_rank,
            mine=per_rank[self.rank] if manifest.world == self.world else None,
            skipped=skipped,
        )


if __name__ == "__main__":
    sys.exit(main())
