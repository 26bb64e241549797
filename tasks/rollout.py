"""One version after another in service on one TorchServe, without a lost request and without an unproved answer.

The order is the one that lost nothing when it was measured: register without waiting, wait for READY workers, golden
requests to the new version, canary, default version, soak, alias, commit; then the old one is drained and removed.
Not covered: record, commit and undoing (tasks.transaction), pods of a cluster (tasks.rolling_update).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments.errors import GiveUp, TryAgain
from deployments.serving import ModelServer, Served
from deployments.torchserve_launch import worker_error
from tasks.champion import Champion
from tasks.endpoint import EndpointRecord, Version
from tasks.proof import Limits, Proof
from tasks.transaction import commit, note, proof_of

CRASHES = 2  # worker processes that died while loading: more of them is a loop, not bad luck
POLL = 0.1  # seconds


class Rollout:
    """A `Change` (tasks.transaction) of the versions on one TorchServe. `on_phase` hears of every transition."""

    def __init__(
        self,
        server: ModelServer,
        champion: Champion,
        record: EndpointRecord,
        limits: Limits,
        *,
        on_phase: Callable[[str], None] = lambda phase: None,
    ):
        self.server, self.champion, self.record, self.limits = server, champion, record, limits
        self.model = record.pipeline
        self.on_phase = on_phase

    def prove_and_switch(self, target: Version, proof: Proof) -> int:
        """From registering to the commit."""
        note(self, "registering")
        self.register(target)
        note(self, "proving")
        passed = proof.prove(pinned=True)
        proof.canary(self.record.serving())
        note(self, "switching")
        self.server.set_default(self.model, target.label)
        note(self, "soaking")
        passed += self.soak(target, proof)
        commit(self, target)
        return passed

    def proof(self, target: Version, samples: int) -> Proof:
        """What the target has to answer. Raises GiveUp if its archive or its golden answers are damaged."""
        return proof_of(self, self.server, target, samples)

    def register(self, target: Version) -> None:
        """Load the version beside the others and wait until its workers are READY; a healthy one is adopted."""
        present = self.find(target.label)
        if present and present.ready < present.workers and not present.default:
            self.server.unregister(self.model, target.label)  # left by an attempt that failed
            present = None
        log = Path(self.limits.server_logs) / "model_log.log"
        read = log.stat().st_size if self.limits.server_logs and log.is_file() else 0
        if present is None:
            self.server.register(self.model, Path(target.mar).name, workers=int(target.serve.get("workers", 1)))
            self.on_phase("registered")
        give_up, seen = time.monotonic() + self.limits.start_seconds, set[int]()
        while True:
            present = self.find(target.label)
            if present is None:
                raise TryAgain(f"{self.model} {target.label} vanished while it loaded: the server was restarted")
            if present.workers and present.ready >= present.workers:
                return
            seen |= set(present.pids)
            if len(seen) > CRASHES + present.workers:
                raise GiveUp(
                    f"{self.model} {target.label}: its worker died {len(seen)} times while loading; {self.reason(read)}"
                )
            if time.monotonic() > give_up:
                raise GiveUp(
                    f"{self.model} {target.label}: {present.ready} of {present.workers} workers READY after "
                    f"{self.limits.start_seconds:g} s; {self.reason(read)}"
                )
            time.sleep(POLL)

    def reason(self, since: int) -> str:
        """Why a worker did not start: its last error, or where to find it."""
        error = worker_error(Path(self.limits.server_logs), since) if self.limits.server_logs else ""
        return error or "the reason stands in TorchServe's model_log.log"

    def soak(self, target: Version, proof: Proof) -> int:
        """With real traffic on it, the new version keeps answering rightly and keeps its workers. Raises GiveUp."""
        end, passed, before = time.monotonic() + self.limits.soak_seconds, 0, self.find(target.label)
        while True:
            passed += proof.prove(pinned=False, count=target.golden_count)
            if time.monotonic() >= end:
                break
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))
        after = self.find(target.label)
        if not after or not before or not after.default or after.ready < after.workers or after.pids != before.pids:
            raise GiveUp(
                f"{self.model} {target.label}: a worker died within the soak of {self.limits.soak_seconds:g} s"
            )
        return passed

    def restore(self) -> None:
        """A server that came back empty gets the version in service before anything else. No effect otherwise."""
        serving = self.record.serving()
        if serving and not any(found.default and found.label == serving.label for found in self.versions()):
            unfinished = self.record.read()["transaction"]
            if not (unfinished and self.find(serving.label)):  # a switch under way is continued, not undone
                self.reconcile()

    def reconcile(self) -> None:
        """Make the server's default version and the alias equal the record; drain and remove every other version."""
        serving = self.record.serving()
        transaction = self.record.read()["transaction"]
        if serving:
            self.register(serving)
            if not self.must_find(serving.label).default:
                self.server.set_default(self.model, serving.label)
            if self.champion.read() != serving.version:
                self.champion.move(serving.version)
        elif transaction and self.champion.read() != transaction["alias_before"]:
            self.champion.move(transaction["alias_before"])
        self.on_phase("reconciled")
        found = sorted(self.versions(), key=lambda version: version.default)  # the default one only goes last
        for version in found:
            if serving is None or version.label != serving.label:
                if not self.never_served(version, transaction):
                    self.drain(version)
                self.server.unregister(self.model, version.label)

    def never_served(self, version: Served, transaction: dict[str, Any] | None) -> bool:
        """Whether the version is one that failed before it got traffic: a broken one need not be waited for."""
        if transaction is None or version.default or transaction["target"]["label"] != version.label:
            return False
        return transaction.get("reached", transaction["phase"]) in ("begun", "registering", "proving")

    def drain(self, version: Served) -> None:
        """Wait until every request that the version holds is answered.

        Its queue is first in, first out, and a worker does one batch at a time: a worker that answers a request sent
        now has answered all older ones. So requests are sent until each worker has answered one, for as long at most
        as TorchServe lets a request live. The queue's length alone says nothing about the batch inside a worker.
        """
        if version.ready == 0:
            return
        from concurrent.futures import ThreadPoolExecutor

        waiting, end = set(version.pids), time.monotonic() + version.response_timeout + 1
        with ThreadPoolExecutor(max_workers=max(2, 2 * version.workers)) as pool:
            while waiting and time.monotonic() < end:
                asks = [pool.submit(self.probe, version) for _ in range(max(2, 2 * version.workers))]
                answered = {pid for ask in asks if (pid := ask.result())}
                waiting -= answered
                if not answered:
                    time.sleep(POLL)
                now = self.find(version.label)
                if now is None or (now.pending == 0 and now.ready == 0):
                    return
                waiting &= set(now.pids)  # one that died has lost its batch already
        time.sleep(0.2)  # answers of the probe's own batch may still be on their way out

    def probe(self, version: Served) -> int:
        """Send something through the version's queue; the process that answered, 0 if that is not known."""
        try:
            answer = self.server.predict(self.model, b"", label=version.label, timeout=version.response_timeout)
        except TryAgain:
            return 0
        worker = answer.headers.get("x-worker", "0")
        return int(worker) if worker.isdigit() else 0

    def holds(self, target: Version) -> bool:
        """Whether this version is the default one, healthy and alone."""
        found = self.versions()
        healthy = [version.label for version in found if version.default and version.ready >= version.workers]
        return [version.label for version in found] == healthy == [target.label]

    def versions(self) -> list[Served]:
        return self.server.versions(self.model)

    def find(self, label: str) -> Served | None:
        return next((version for version in self.versions() if version.label == label), None)

    def must_find(self, label: str) -> Served:
        found = self.find(label)
        if found is None:
            raise TryAgain(f"{self.model} {label} is not on the server any more")
        return found
