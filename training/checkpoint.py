"""Checkpoints that survive a kill at any moment and cost the training loop next to nothing.

`save` starts copying the state and returns; `wait_staged` is called before the optimizer changes what is being copied;
a thread hashes, writes, fsyncs and commits. torch.distributed.checkpoint's planners decide which rank writes which part
and which parts a rank needs at load: DDP replicas are written once, and FSDP2 shards load into another number of
ranks. `load` takes the newest checkpoint whose every byte is verified; damaged ones are quarantined and reported.

    python -m training.checkpoint URL [--json] [--no-hash]     list and verify the checkpoints at URL

Not covered: when to save (training/interruption.py, the loop), and what a resharded rank does with other ranks'
random states: `CheckpointInfo.per_rank` gives them all.
"""

from __future__ import annotations

import json
import math
import os
import platform
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
import torch.distributed as dist

from training import shard_file
from training.checkpoint_audit import main, newest_complete, verify
from training.checkpoint_load import IdentityMismatch, Verified, take, verify_for
from training.checkpoint_plan import plan_save, signature
from training.checkpoint_store import CheckpointWriteError, Store, open_store
from training.device_staging import DeviceStaging
from training.manifest import DamagedCheckpoint, Manifest, StoredFile
from training.shard_file import Layout, shard_name
from training.staging import HostStaging, Snapshot, Staging
from training.state_codec import encode
from training.state_tree import FlatState, StateMismatch, flatten

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


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A damaged checkpoint that `load` passed over."""

    name: str
    reason: str
    moved_to: str


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A committed checkpoint. `per_rank[r]` is what rank r of the saving world gave; `mine` is this rank's when the
    world has the same size, else None. Right after a save, `per_rank` holds only this rank's."""

    step: int
    complete: bool
    world: int
    name: str
    url: str
    meta: Mapping[str, Any]
    manifest: Manifest
    per_rank: tuple[Any, ...] = ()
    mine: Any = None
    skipped: tuple[Skipped, ...] = ()


def p95(values: Sequence[float]) -> float:
    """The 95th percentile (nearest rank, so a measured value); nan for none."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else math.nan


def _environment() -> dict[str, str]:
    processor = platform.processor() or platform.machine()
    with suppress(OSError), open("/proc/cpuinfo") as lines:
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "processor": processor}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


@dataclass(kw_only=True)
class _Plan:
    """Which parts of which tensors this rank writes; valid while the state's structure stays the same."""

    signature: int
    layout: Layout
    staging: Staging


@dataclass(kw_only=True)
class _Job:
    """One save on its way."""

    step: int
    name: str
    complete: bool
    metadata: dict[str, Any]
    meta: Any
    per_rank: Any
    plan: _Plan
    started: float
    snapshot: Snapshot
    durable: Future[CheckpointInfo]
    stall_index: int | None = None  # of this save in `stall_seconds`


class Checkpointer:
    """Saves and loads the checkpoints of one training. All ranks construct one and call the same methods in the same
    order. `group` must be a gloo group that nothing else uses; by default one is made. `identity` are digests (code,
    config, data) that a loaded checkpoint must match."""

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
        self.keep, self.rank, self.world = keep, rank, world
        self.identity = dict(identity or {})
        self.stall_seconds: list[float] = []
        self.durable_seconds: list[float] = []
        if world > 1 and group is None:
            group = dist.new_group(backend="gloo")
        self._group = group
        # Directories of one step sort by attempt: time first, then something that no other attempt has.
        self._token = self._agree_on(f"{time.time_ns() // 1_000_000:012x}{os.urandom(2).hex()}")
        self._count = 0
        self._plan: _Plan | None = None
        self._job: _Job | None = None
        self._pending_stall: float | None = None
        self._failures: deque[BaseException] = deque()
        self._environment = _environment()
        self._swept = False
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None

    # -- agreement between ranks ------------------------------------------------------------------------------------

    def _gather(self, kind: str, value: Any) -> list[Any]:
        """Every rank's value, in rank order. `kind` shows when ranks are not at the same place of the protocol."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, (kind, value), group=self._group)
        if len(kinds := {entry[0] for entry in found}) > 1:
            raise RuntimeError(
                f"ranks disagree about what to checkpoint: {sorted(kinds)}; all must save the same state"
            )
        return [entry[1] for entry in found]

    def _agree_on(self, value: Any) -> Any:
        """Rank 0's value."""
        return self._gather("agree", value)[0]

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
        json.dumps(meta)  # the caller's mistake belongs to the caller's line
        flat = flatten(state)
        plan = self._planned(flat)
        sources = self._sources(flat, plan)
        metadata = {"rank": self.rank, "per_rank": encode(dict(per_rank), "per_rank")}
        if self.rank == 0:
            metadata |= {"objects": encode(flat.objects), "aliases": flat.aliases}
        self._count += 1
        job = _Job(
            step=step,
            name=f"step-{step:010d}-{self._token}-{self._count:04d}",
            complete=complete,
            metadata=metadata,
            meta=dict(meta),
            per_rank=dict(per_rank),
            plan=plan,
            started=started,
            snapshot=plan.staging.start(sources),
            durable=Future(),
        )
        self._job = job
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, name="checkpoint-writer", daemon=True)
            self._writer.start()
        self._queue.put(job)
        self._pending_stall = time.perf_counter() - started
        if blocking:
            self.wait_staged()

    def wait_staged(self) -> float:
        """Wait until the state may change. Returns the seconds that the last save has stalled the caller: the call
        of `save` and this wait; 0.0 when nothing is being staged."""
        if self._pending_stall is None or self._job is None:
            return 0.0
        stall, self._pending_stall = self._pending_stall, None
        started = time.perf_counter()
        self._job.snapshot.wait()
        stall += time.perf_counter() - started
        self._job.stall_index = len(self.stall_seconds)
        self.stall_seconds.append(stall)
        return stall

    def wait_durable(self) -> CheckpointInfo | None:
        """Wait until the last save is committed, or raise what it or one before it failed with (once). None when
        nothing was saved."""
        self.wait_staged()
        job = self._job
        if job is not None:
            wait([job.durable])
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
            if self._writer is not None:
                self._queue.put(None)
                self._writer.join()
                self._writer = None
            if self._plan is not None:
                self._plan.staging.close()
                self._plan = None

    def _raise_failure(self) -> None:
        if self._failures:
            if self._job is not None and self._job.durable.done() and self._job.durable.exception():
                self._job = None
            raise self._failures.popleft()

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Plan and allocate now what the first save would plan and allocate. Collective; call it when the optimizer
        has its state (after a load, or after the first step)."""
        self._planned(flatten(state))

    def _planned(self, flat: FlatState) -> _Plan:
        structure = signature(flat)
        if self._plan is not None and self._plan.signature == structure:
            return self._plan
        if self._job is not None:
            wait([self._job.durable])
        if self._plan is not None:
            self._plan.staging.close()
            self._plan = None
        layout = plan_save(flat, self.rank, self._gather)
        self._plan = _Plan(signature=structure, layout=layout, staging=self._staging(layout, flat))
        return self._plan

    def _staging(self, layout: Layout, flat: FlatState) -> Staging:
        devices = {tensor.device for tensor in flat.tensors.values() if tensor.device.type != "cpu"}
        if not devices:
            return HostStaging(layout)
        if len(devices) > 1 or any(device.type != "cuda" for device in devices):
            raise TypeError(f"state on {', '.join(map(str, devices))}: one CUDA device per rank is supported")
        return DeviceStaging(layout, devices.pop())

    def _sources(self, flat: FlatState, plan: _Plan) -> list[tuple[shard_file.Piece, torch.Tensor]]:
        """This rank's parts as local tensors; those that do not hold still until the optimizer's step as copies."""
        sources = []
        tensors, steady = flat.tensors, flat.steady
        with torch.no_grad():
            for piece in plan.layout.pieces:
                tensor = tensors[piece.key]
                if hasattr(tensor, "to_local"):
                    tensor = tensor.to_local()
                if piece.key not in steady:
                    tensor = tensor.detach().clone()
                sources.append((piece, tensor))
        return sources

    # -- the writer's thread ----------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        with suppress(OSError):  # hashing and writing take what the training's own threads leave
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while (job := self._queue.get()) is not None:
            try:
                info = self._write(job)
                if job.stall_index is not None:
                    self.stall_seconds[job.stall_index] += job.snapshot.device_seconds()
            except BaseException as error:  # handed to the thread that waits
                self._failures.append(error)
                job.durable.set_exception(error)
            else:
                self.durable_seconds.append(time.perf_counter() - job.started)
                job.durable.set_result(info)

    def _write(self, job: _Job) -> CheckpointInfo:
        failure: Exception | None = None
        stored: StoredFile | None = None
        try:
            stored = self._write_shard(job)
        except Exception as error:
            failure = error
        finally:
            job.snapshot.release()
        outcomes = self._gather(f"written {job.name}", (stored, failure and f"{type(failure).__name__}: {failure}"))
        manifest = self._manifest(job, outcomes) if all(error is None for _, error in outcomes) else None
        if self.rank == 0 and manifest is not None:
            try:
                self.store.commit(job.name, manifest.to_json())
            except Exception as error:
                failure = error
        committed = self._gather(f"committed {job.name}", failure and f"{type(failure).__name__}: {failure}")
        if self.rank == 0 and any(committed):
            self.store.abandon(job.name)
        if failure is not None:
            raise failure
        for rank, reason in enumerate(committed):
            if reason:
                raise CheckpointWriteError(f"rank {rank} could not write checkpoint {job.name}: {reason}")
        assert manifest is not None
        if self.rank == 0:
            self._prune()
        return CheckpointInfo(
            step=job.step,
            complete=job.complete,
            world=self.world,
            name=job.name,
            url=f"{self.store.url}/{job.name}",
            meta=job.meta,
            manifest=manifest,
            per_rank=(job.per_rank,),
            mine=job.per_rank,
        )

    def _write_shard(self, job: _Job) -> StoredFile:
        header = job.plan.layout.header(job.metadata)
        file = shard_name(self.rank)
        writer = self.store.create(job.name, file, len(header) + job.plan.layout.nbytes)
        try:
            stored = shard_file.write_shard(writer, header, job.snapshot.chunks())
            writer.finish()
        except BaseException:
            writer.drop()
            raise
        self.store.settle(job.name)
        return stored

    def _manifest(self, job: _Job, outcomes: Sequence[Any]) -> Manifest:
        return Manifest(
            step=job.step,
            complete=job.complete,
            world=self.world,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            meta=job.meta,
            identity=self.identity,
            environment=self._environment,
            files={shard_name(rank): stored for rank, (stored, _) in enumerate(outcomes)},
        )

    def _prune(self) -> None:
        """Remove what is older than the `keep` newest, now that a newer one is committed."""
        for name in self.store.names()[self.keep :]:
            self.store.remove(name)

    # -- loading ----------------------------------------------------------------------------------------------------

    def load(self, state: Mapping[str, Any]) -> CheckpointInfo | None:
        """Put the newest verified checkpoint into `state`; None only when there has never been one.

        Damaged ones are quarantined and told in `skipped`. Raises NoGoodCheckpoint when all are damaged,
        IdentityMismatch for other code, config or data, StateMismatch for another model."""
        if self.rank == 0:
            self.store.sweep(self._token)
        skipped: list[Skipped] = []
        for name in self._agree_on(self.store.names()):
            found, damage, refusal = None, None, None
            try:
                found = verify_for(self.store, name, state, self.identity, self.rank, self.world)
            except DamagedCheckpoint as error:
                damage = str(error)
            except Exception as error:  # raised once the other ranks know, or they would wait for this one
                refusal = error
            outcomes = self._gather(f"verified {name}", (damage, refusal and f"{type(refusal).__name__}: {refusal}"))
            if refusal is not None:
                raise refusal
            if refused := [text for _, text in outcomes if text]:
                raise RuntimeError(f"another rank could not load {self.store.url}/{name}: {refused[0]}")
            reasons = [text for text, _ in outcomes]
            if found is not None and not any(reasons):
                return self._taken(name, found, state, tuple(skipped))
            told = "; ".join(sorted({r for r in reasons if r}))
            moved = self._agree_on(self.store.quarantine(name, told) if self.rank == 0 else None)
            skipped.append(Skipped(name=name, reason=told, moved_to=moved))
        held = self._agree_on(self.store.quarantined())
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
