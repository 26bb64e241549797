"""The thread that turns a staged copy into a committed checkpoint: hash, write, fsync, agree, commit, prune.

A checkpoint is committed when every rank's file is durable and rank 0 has written the manifest; any rank's failure
undoes it on all, and the ones before it stand.
Not covered: staging (training/staging.py), the API (training/checkpoint.py).
"""

from __future__ import annotations

import json
import logging
import os
import platform
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from training.agreement import Agreement
from training.checkpoint_info import CheckpointInfo
from training.checkpoint_store import CheckpointWriteError, Store
from training.manifest import Manifest, StoredFile
from training.shard_file import Layout, shard_name, write_shard
from training.staging import Snapshot, be_modest
from training.state_codec import encode

_log = logging.getLogger(__name__)
NICE = 13  # at 10, steps beside a save on two processors took 1.1 to 1.2 of an idle one; the higher, the later durable


@dataclass(kw_only=True)
class Job:
    """One save on its way."""

    step: int
    name: str
    complete: bool
    metadata: dict[str, Any]  # of this rank's file; encoded by the writer
    meta_json: str
    per_rank: Any
    layout: Layout
    started: float  # time.perf_counter() at the call of save
    durable: Future[CheckpointInfo]
    snapshot: Future[Snapshot] = field(default_factory=Future)
    awaited: threading.Event = field(default_factory=threading.Event)  # training stands still until this is durable
    stall_index: int | None = None  # of this save in `stall_seconds`


class CheckpointWriter:
    """Writes jobs one after the other. `failures` are those not yet told; `durable_seconds` from call to commit."""

    def __init__(self, store: Store, agreement: Agreement, keep: int, identity: Mapping[str, str]) -> None:
        self._store, self._agreement, self._keep, self._identity = store, agreement, keep, identity
        self._environment = _environment()
        self.failures: deque[BaseException] = deque()
        self.durable_seconds: list[float] = []
        self.stall_seconds: list[float] = []
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def write(self, job: Job) -> None:
        """Write the job, whose copy is staged (or about to be); called by whoever made the copy, so that the loop wakes
        one thread and not two."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
            self._thread.start()
        self._queue.put(job)

    def close(self) -> None:
        """Stop the thread; every job must be done."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        be_modest()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while (job := self._queue.get()) is not None:
            try:
                info = self._write(job)
                if job.stall_index is not None:
                    self.stall_seconds[job.stall_index] += job.snapshot.result().device_seconds()
            except BaseException as error:  # handed to the thread that waits
                self.failures.append(error)
                job.durable.set_exception(error)
            else:
                self.durable_seconds.append(time.perf_counter() - job.started)
                job.durable.set_result(info)
            del job

    def _write(self, job: Job) -> CheckpointInfo:
        gather, rank = self._agreement.gather, self._agreement.rank
        failure: Exception | None = None
        stored: StoredFile | None = None
        try:
            stored = self._write_shard(job)
        except Exception as error:
            failure = error
        finally:
            job.snapshot.result().release()
        outcomes = gather(f"written {job.name}", (stored, failure and f"{type(failure).__name__}: {failure}"))
        manifest = self._manifest(job, outcomes) if all(error is None for _, error in outcomes) else None
        if rank == 0 and manifest is not None:
            try:
                self._store.commit(job.name, manifest.to_json())
            except Exception as error:
                failure = error
        committed = gather(f"committed {job.name}", failure and f"{type(failure).__name__}: {failure}")
        if rank == 0 and any(committed):
            self._store.abandon(job.name)
        if failure is not None:
            raise failure
        for other, reason in enumerate(committed):
            if reason:
                raise CheckpointWriteError(f"rank {other} could not write checkpoint {job.name}: {reason}")
        assert manifest is not None
        if rank == 0:
            self._prune()
        return CheckpointInfo(
            step=job.step,
            complete=job.complete,
            world=self._agreement.world,
            name=job.name,
            url=f"{self._store.url}/{job.name}",
            meta=manifest.meta,
            manifest=manifest,
            per_rank=(job.per_rank,),
            mine=job.per_rank,
        )

    def _prune(self) -> None:
        """Remove what is older than the newest `keep`, now that a newer one is committed. What cannot be removed stays
        and is tried again next time: the checkpoint just written is none the worse for it."""
        try:
            for name in self._store.names()[self._keep :]:
                self._store.remove(name)
        except Exception as error:  # each store's client library has its own errors
            _log.warning("%s: old checkpoints could not be removed: %s", self._store.url, error)

    def _write_shard(self, job: Job) -> StoredFile:
        header = job.layout.header(encode(job.metadata))
        writer = self._store.create(job.name, shard_name(self._agreement.rank), len(header) + job.layout.nbytes)
        try:
            stored = write_shard(writer, header, job.snapshot.result().chunks(), loop_rests=job.awaited.is_set)
            writer.finish()
        except BaseException:
            writer.drop()
            raise
        self._store.settle(job.name)
        return stored

    def _manifest(self, job: Job, outcomes: Sequence[Any]) -> Manifest:
        return Manifest(
            step=job.step,
            complete=job.complete,
            world=self._agreement.world,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            meta=json.loads(job.meta_json),
            identity=self._identity,
            environment=self._environment,
            files={shard_name(rank): stored for rank, (stored, _) in enumerate(outcomes)},
        )


def _environment() -> dict[str, str]:
    processor = platform.processor() or platform.machine()
    with suppress(OSError), open("/proc/cpuinfo") as lines:
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "processor": processor}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found
