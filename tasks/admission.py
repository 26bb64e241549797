"""Before any replica may see a .mar: the same server, on scratch ports, must serve it rightly.

Golden requests within tolerance of the torch model; the same answers at every batch size from 1 to 32; bad requests
cost a 4xx and nothing else, alone and amid a batch. It costs seconds and spares a rollout that would be undone. An
admitted archive is remembered by its sha256.
Not covered: load and latency (those are the rollout's), other hardware than this.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deployments.errors import GiveUp, TryAgain
from deployments.scratch_torchserve import scratch_torchserve
from deployments.serving import Answer, TorchServe
from deployments.torchserve_launch import worker_error
from tasks.archive import validate_archive
from tasks.golden import Golden, judge, read_golden
from tasks.records import Store

LARGEST_BATCH = 32
BATCH_DELAY = 150  # ms in which the requests of one batch have to arrive
TWIN = "-batches"  # the same archive once more, under another name, with other batch settings


@dataclass(frozen=True, kw_only=True)
class AdmissionRequest:
    """What to admit. Paths absolute, seconds."""

    pipeline: str
    version: str
    label: str
    mar: str
    sha256: str
    golden: str
    golden_count: int = 20
    tolerance: float = 1e-4
    workers: int = 1
    start_seconds: float = 120.0
    store: str = ""  # root of the records; "": not remembered


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What the archive was admitted on."""

    sha256: str
    server: str  # name and version
    golden: int
    max_difference: float  # of numbers, over golden requests and all batch sizes
    batches: list[int]  # sizes at which all answers were right
    bad_requests: dict[str, int]  # what was sent -> status
    seconds: float
    remembered: bool = field(default=False, compare=False)


def admit(request: AdmissionRequest) -> Admission:
    """Raises GiveUp with the reason if the archive may not be served, TryAgain if the scratch server does not start."""
    store = Store(root=request.store) if request.store else None
    if store and (known := store.read(f"admissions/{request.sha256}")):
        return Admission(**known | {"remembered": True})
    began = time.monotonic()
    golden = read_golden(request.golden, max(request.golden_count, LARGEST_BATCH))
    with tempfile.TemporaryDirectory(prefix="admit-") as name:
        folder = Path(name)
        (folder / "models").mkdir()
        mar = folder / "models" / Path(request.mar).name
        try:
            os.link(request.mar, mar)  # never the real store: TorchServe may change what it is given
        except OSError:
            shutil.copyfile(request.mar, mar)
        content = validate_archive(mar, pipeline=request.pipeline, label=request.label).content_digest
        with scratch_torchserve(folder / "state", folder / "models") as server:
            trial = Trial(server, request, content, folder / "state" / "logs")
            trial.load(mar.name)
            largest = trial.golden(golden[: request.golden_count])
            sizes, widest = trial.batches(golden)
            bad = trial.bad_requests(golden)
    result = Admission(
        sha256=request.sha256,
        server=f"torchserve {installed('torchserve')}, torch {installed('torch')}",
        golden=min(request.golden_count, len(golden)),
        max_difference=max(largest, widest),
        batches=sizes,
        bad_requests=bad,
        seconds=round(time.monotonic() - began, 3),
    )
    if store:
        store.write(f"admissions/{request.sha256}", {k: v for k, v in asdict(result).items() if k != "remembered"})
    return result


class Trial:
    """One archive on one scratch server."""

    def __init__(self, server: TorchServe, request: AdmissionRequest, content: str, logs: Path):
        self.server, self.request, self.content, self.logs = server, request, content, logs
        self.model = request.pipeline

    def load(self, mar: str) -> None:
        """Twice: with its own settings, and with a batch as large as we test. Raises GiveUp with the worker's error."""
        self.server.register(self.model, mar, workers=self.request.workers)
        self.server.register(self.model + TWIN, mar, workers=1, batch=(LARGEST_BATCH, BATCH_DELAY))
        give_up, seen = time.monotonic() + self.request.start_seconds, set[int]()
        while True:
            found = [*self.server.versions(self.model), *self.server.versions(self.model + TWIN)]
            if len(found) == 2 and all(version.workers and version.ready >= version.workers for version in found):
                return
            seen |= {pid for version in found for pid in version.pids}
            error = worker_error(self.logs)
            if len(seen) > 2 + self.request.workers or time.monotonic() > give_up:
                raise GiveUp(
                    f"{self.where()}: its worker does not start: {error or 'no error in its log; is it slow?'}"
                )
            time.sleep(0.1)

    def golden(self, golden: list[Golden]) -> float:
        """Each golden request alone; the largest difference. Raises GiveUp."""
        return max(self.right(sample, self.ask(sample.body)) for sample in golden)

    def batches(self, golden: list[Golden]) -> tuple[list[int], float]:
        """N requests at once for each N; the sizes that the worker really saw, and the largest difference."""
        sizes, largest = set[int](), 0.0
        for size in range(1, LARGEST_BATCH + 1):
            samples = [golden[(size + n) % len(golden)] for n in range(size)]
            for sample, answer in zip(samples, self.together([s.body for s in samples]), strict=True):
                largest = max(largest, self.right(sample, answer, f" in a batch of {size}"))
                sizes.add(int(answer.headers.get("x-batch-size", 0)))
        if max(sizes) == 1:
            raise GiveUp(f"{self.where()}: {LARGEST_BATCH} requests at once were never batched")
        return sorted(sizes), largest

    def bad_requests(self, golden: list[Golden]) -> dict[str, int]:
        """What no client should send: each gets a status below 500, and the next good request its right answer."""
        good = golden[0]
        bodies = {
            "empty": b"",
            "one byte": b"\0",
            "not text": bytes(range(256)) * 4,
            "half a request": good.body[: len(good.body) // 2],
            "two requests": good.body * 2,
            "an array": b"[]",
            "deep": b"[" * 10_000,
        }
        before = self.server.versions(self.model)[0].pids
        statuses = {}
        for name, body in bodies.items():
            statuses[name] = self.ask(body).status
            if statuses[name] >= 500:
                raise GiveUp(f"{self.where()}: a bad request ({name}) is answered with {statuses[name]}; expected 4xx")
            self.right(good, self.ask(good.body), f" after a bad request ({name})")
        mixed = [good.body, b"", good.body, bodies["half a request"], good.body]
        for body, answer in zip(mixed, self.together(mixed), strict=True):
            if body == good.body:
                self.right(good, answer, " beside a bad request")
        if self.server.versions(self.model)[0].pids != before:
            raise GiveUp(f"{self.where()}: a bad request ended its worker: {worker_error(self.logs)}")
        if all(status == 200 for status in statuses.values()):
            raise GiveUp(
                f"{self.where()}: preprocess accepts anything; it must raise ValueError for what it cannot read"
            )
        return statuses

    def ask(self, body: bytes, model: str = "") -> Answer:
        """One request. Raises GiveUp if it is not answered."""
        try:
            return self.server.predict(model or self.model, body, timeout=60)
        except TryAgain as error:
            raise GiveUp(f"{self.where()}: a request was not answered: {error}; {worker_error(self.logs)}") from error

    def together(self, bodies: list[bytes]) -> list[Answer]:
        """Requests at the same moment, to the twin."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(len(bodies)) as pool:
            ask: Callable[[bytes], Answer] = lambda body: self.ask(body, self.model + TWIN)  # noqa: E731
            return list(pool.map(ask, bodies))

    def right(self, sample: Golden, answer: Answer, when: str = "") -> float:
        """The difference of a right answer. Raises GiveUp for a wrong one."""
        document: dict[str, Any] = answer.document()
        verdict = judge(document, sample.answer, self.request.tolerance)
        why = verdict.why
        if answer.status != 200:
            why = f"status {answer.status}: {answer.body.decode(errors='replace')[:300]}"
        elif (
            document.get("model_version") != self.request.version
            or answer.headers.get("x-content-digest") != self.content
        ):
            why = f"it is of version {document.get('model_version')!r}, or of other files than the archive's"
        if why:
            raise GiveUp(f"{self.where()}: {sample.name}{when} is answered wrongly: {why}")
        return verdict.difference

    def where(self) -> str:
        return f"admission of {self.model} {self.request.label}"


def installed(package: str) -> str:
    """The version of an installed package."""
    from importlib.metadata import version

    return version(package)
