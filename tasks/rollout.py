"""One version after another in service, without a lost request and without an unproved answer.

The order is the one that lost nothing when it was measured: register without waiting, wait for READY workers, golden
requests to the new version, canary, default version, soak, alias, commit; then the old one is drained and removed.
Every phase is recorded before its effect. Whatever fails or kills it, `reconcile` makes server and registry equal the
record again: before the commit that is the old version, after it the new one. So a repeated deployment needs no
special case. Not covered: locks and requests (tasks.deploy_model), what a right answer is (tasks.golden).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.errors import GiveUp, StepError, TryAgain
from deployments.serving import ModelServer, Served
from deployments.torchserve_launch import worker_error
from tasks.archive import validate_archive
from tasks.champion import Champion
from tasks.endpoint import EndpointRecord, Version
from tasks.golden import Golden, judge, read_golden

CRASHES = 2  # worker processes that died while loading: more of them is a loop, not bad luck
POLL = 0.1  # seconds


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a new version has to keep to. Seconds."""

    start_seconds: float = 120.0  # until its workers are READY
    soak_seconds: float = 1.0
    canary_samples: int = 0  # held-out samples asked of both versions; 0: the golden ones only
    min_agreement: float = 1.0  # of the new version's answers with its own torch model
    max_accuracy_drop: float = 0.05  # against the version in service, on the same labelled samples
    max_p95_seconds: float = 1.0
    request_seconds: float = 30.0
    server_logs: str = ""  # TorchServe's log folder, if it is on this machine


class Rollout:
    """Moves one endpoint between versions. `on_phase` hears of every transition (progress, tests)."""

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

    def move(self, kind: str, target: Version) -> int:
        """Put `target` into service; returns the number of golden requests it answered. Raises GiveUp or TryAgain
        after everything is as before."""
        content = self.check_mar(target)
        golden = read_golden(target.golden, max(target.golden_count, self.limits.canary_samples))
        unfinished = self.record.read()["transaction"]
        if unfinished and (
            unfinished["phase"] in ("committed", "undoing") or unfinished["target"]["label"] != target.label
        ):
            self.finish(unfinished)
        self.restore()
        self.record.begin(kind, target, self.champion.read())
        self.on_phase("begun")
        try:
            passed = self.prove_and_switch(target, content, golden)
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            try:
                self.record.phase("undoing", why=why)
                self.on_phase("undoing")
                self.reconcile()
                self.record.close("rolled back", why)
            except StepError as worse:
                raise TryAgain(f"{error}; and the old version could not be restored yet: {worse}") from error
            raise
        self.on_phase("committed")
        self.reconcile()  # the old one is drained and removed
        self.on_phase("drained")
        self.record.close("in service", golden=passed)
        return passed

    def prove_and_switch(self, target: Version, content: str, golden: list[Golden]) -> int:
        """From registering to the commit."""
        self.note("registering")
        self.register(target)
        self.note("proving")
        passed = self.prove(target, content, golden, pinned=True)
        self.canary(golden)
        self.note("switching")
        self.server.set_default(self.model, target.label)
        self.note("soaking")
        passed += self.soak(target, content, golden)
        self.note("aliasing")
        self.champion.move(target.version)
        self.on_phase("aliased")
        if (found := self.champion.read()) != target.version:
            raise TryAgain(
                f"alias {self.champion.alias!r} was set to {target.version} and is {found}: somebody else moves it"
            )
        self.record.commit(target)
        return passed

    def note(self, phase: str) -> None:
        self.record.phase(phase)
        self.on_phase(phase)

    def check_mar(self, target: Version) -> str:
        """The archive is the one that was packaged, and harmless; returns its content digest. Raises GiveUp."""
        from hashlib import file_digest

        path = Path(target.mar)
        if not path.is_file():
            raise GiveUp(f"{path} is missing from the model store; package it again")
        with path.open("rb") as handle:
            found = file_digest(handle, "sha256").hexdigest()
        if found != target.sha256:
            raise GiveUp(f"{path} has sha256 {found}, packaged was {target.sha256}; package it again")
        return validate_archive(path, pipeline=self.model, label=target.label).content_digest

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

    def prove(self, target: Version, content: str, golden: list[Golden], *, pinned: bool) -> int:
        """Ask every golden request and judge the answers. Raises GiveUp with the first wrong one."""
        slow, wrong = list[float](), list[str]()
        may_be_slow = len(golden) - math.ceil(0.95 * len(golden))  # more than these, and the p95 is over its limit
        label = target.label if pinned else ""
        if pinned:  # the first request pays for what torch sets up lazily, and would be the p95 of twenty
            self.server.predict(self.model, golden[0].body, label=label, timeout=self.limits.request_seconds)
        for sample in golden:
            taken, why = self.ask(target, content, sample, label)
            if why:
                wrong.append(f"{sample.name}: {why}")
            if taken > self.limits.max_p95_seconds:
                slow.append(taken)
            if len(slow) > may_be_slow:  # decided: a slow model need not be asked everything
                raise GiveUp(
                    f"{self.model} {target.label}: {len(slow)} golden requests took {min(slow):.3f} s and more; p95 of "
                    f"{len(golden)} may be {self.limits.max_p95_seconds:g} s"
                )
        share = 1 - len(wrong) / len(golden)
        if share < self.limits.min_agreement:
            raise GiveUp(
                f"{self.model} {target.label}: {len(wrong)} of {len(golden)} golden requests answered wrongly; "
                f"first {wrong[0]}"
            )
        return len(golden) - len(wrong)

    def ask(self, target: Version, content: str, sample: Golden, label: str) -> tuple[float, str]:
        """One golden request: seconds, and what is wrong with the answer ("" for nothing)."""
        answer = self.server.predict(self.model, sample.body, label=label, timeout=self.limits.request_seconds)
        document = answer.document()
        if answer.status != 200:
            return answer.seconds, f"status {answer.status}: {answer.body.decode(errors='replace')[:300]}"
        for found, wanted, what in (
            (document.get("model_version"), target.version, "model_version"),
            (answer.headers.get("x-model-label"), target.label, "label"),
            (answer.headers.get("x-content-digest"), content, "digest of the served files"),
        ):
            if found != wanted:
                return answer.seconds, f"{what} {found!r}, expected {wanted!r}"
        return answer.seconds, judge(document, sample.answer, target.tolerance).why

    def canary(self, golden: list[Golden]) -> None:
        """The version in service answers the same labelled samples; the new one must not be clearly worse.

        Both are judged on answers. What the new one answers equals its golden answers by now, so only the old one is
        asked. TorchServe cannot split traffic by share: the canary's share of real traffic is 0 here, and all of it
        after the switch. Raises GiveUp.
        """
        old = self.record.serving()
        labelled = [sample for sample in golden if sample.label is not None]
        if old is None or not labelled or self.limits.canary_samples == 0:
            return
        right, asked = 0, 0
        for sample in labelled:
            answer = self.server.predict(self.model, sample.body, label=old.label, timeout=self.limits.request_seconds)
            if answer.status == 200:  # a request that only the new version understands says nothing about the old
                asked += 1
                right += answer.document().get("label") == sample.label
        before = right / asked if asked else 0.0
        after = sum(sample.answer["label"] == sample.label for sample in labelled) / len(labelled)
        if asked >= len(labelled) / 2 and after < before - self.limits.max_accuracy_drop:
            raise GiveUp(
                f"{self.model}: the new version is right on {after:.3f} of {len(labelled)} labelled samples, the one "
                f"in service on {before:.3f}; allowed is {self.limits.max_accuracy_drop:g} less"
            )

    def soak(self, target: Version, content: str, golden: list[Golden]) -> int:
        """With real traffic on it, the new version keeps answering rightly and keeps its workers. Raises GiveUp."""
        end, passed, before = time.monotonic() + self.limits.soak_seconds, 0, self.find(target.label)
        while True:
            passed += self.prove(target, content, golden[: target.golden_count], pinned=False)
            if time.monotonic() >= end:
                break
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))
        after = self.find(target.label)
        if not after or not before or not after.default or after.ready < after.workers or after.pids != before.pids:
            raise GiveUp(
                f"{self.model} {target.label}: a worker died within the soak of {self.limits.soak_seconds:g} s"
            )
        return passed

    def finish(self, unfinished: dict[str, Any]) -> None:
        """End a transaction that a kill left: forward if it was committed, else back."""
        committed = unfinished["phase"] == "committed"
        self.reconcile()
        self.record.close(
            "in service" if committed else "rolled back", unfinished.get("why") or "the process was killed"
        )

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

    def versions(self) -> list[Served]:
        return self.server.versions(self.model)

    def find(self, label: str) -> Served | None:
        return next((version for version in self.versions() if version.label == label), None)

    def must_find(self, label: str) -> Served:
        found = self.find(label)
        if found is None:
            raise TryAgain(f"{self.model} {label} is not on the server any more")
        return found
