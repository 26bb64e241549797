"""The endpoint against the trained model: every held-out sample through HTTP, answer by answer, with latencies.

    python -m tasks.step check_endpoint request.json result.json

One connection kept alive, one request at a time: the figures are latencies, not throughput. Standard library only.
Not covered: behaviour under load (bench-serving), answers of other versions (every answer must be of this one).
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from deployments.errors import GiveUp, TryAgain
from tasks.golden import Golden, judge, percentile, read_golden

NAMED = 10  # disagreements that are named


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """What to ask, and what is good enough."""

    url: str  # .../predictions/<pipeline>
    pipeline: str
    version: str  # MLflow's; every answer must carry it
    heldout: str  # heldout.jsonl
    min_agreement: float = 1.0
    max_p95_seconds: float = 1.0
    samples: int = 1000  # at most
    metric: str = "accuracy"
    tolerance: float = 1e-4
    timeout_seconds: float = 30.0


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What was found. Latencies in milliseconds."""

    samples: int
    agreement: float  # share of answers that equal the torch model's
    accuracy: float  # of the endpoint, on labelled samples; nan as None when nothing is labelled
    model_accuracy: float  # of the torch model on the same samples
    max_difference: float  # largest difference of numbers among agreeing answers
    p50_ms: float
    p95_ms: float
    disagreements: list[str]  # names of the first ten


def check_endpoint(request: CheckRequest) -> CheckResult:
    """Ask, compare, and raise GiveUp if agreement or latency is not good enough, TryAgain if the server is away."""
    samples = read_golden(request.heldout, request.samples)
    seconds: list[float] = []
    wrong: list[tuple[str, str]] = []
    largest, right, model_right, labelled = 0.0, 0, 0, 0
    with Connection(request.url, request.timeout_seconds) as connection:
        connection.ask(samples[0].body)  # opens the connection, and is not measured
        for sample in samples:
            began = time.monotonic()
            status, answer = connection.ask(sample.body)
            seconds.append(time.monotonic() - began)
            difference, why = compare(status, answer, sample, request)
            if why:
                wrong.append((sample.name, why))
            else:
                largest = max(largest, difference)
            if sample.label is not None:
                labelled += 1
                right += answer.get("label") == sample.label
                model_right += sample.answer["label"] == sample.label
    result = CheckResult(
        samples=len(samples),
        agreement=1 - len(wrong) / len(samples),
        accuracy=right / labelled if labelled else 0.0,
        model_accuracy=model_right / labelled if labelled else 0.0,
        max_difference=largest,
        p50_ms=round(percentile(seconds, 0.5) * 1000, 3),
        p95_ms=round(percentile(seconds, 0.95) * 1000, 3),
        disagreements=[name for name, _ in wrong[:NAMED]],
    )
    if result.agreement < request.min_agreement:
        name, why = wrong[0]
        raise GiveUp(
            f"{request.url}: {len(wrong)} of {len(samples)} answers are not the torch model's (agreement "
            f"{result.agreement:.4f}, wanted {request.min_agreement:g}); first {name}: {why}"
        )
    if result.p95_ms > request.max_p95_seconds * 1000:
        raise GiveUp(
            f"{request.url}: p95 is {result.p95_ms:.1f} ms, allowed {request.max_p95_seconds * 1000:g} ms; "
            "lower serve.batch_size or serve.max_batch_delay, or raise check.max_p95"
        )
    return result


def compare(status: int, answer: dict[str, object], sample: Golden, request: CheckRequest) -> tuple[float, str]:
    """Largest difference, and what is wrong ("" for nothing)."""
    if status != 200:
        return math.inf, f"status {status}: {str(answer)[:300]}"
    for key, wanted in (("model", request.pipeline), ("model_version", request.version)):
        if answer.get(key) != wanted:
            return math.inf, f"{key} {answer.get(key)!r}, expected {wanted!r}"
    verdict = judge(answer, sample.answer, request.tolerance)
    return verdict.difference, verdict.why


class Connection:
    """One connection to a prediction URL, opened again where the server closes it (it does after a 4xx)."""

    def __init__(self, url: str, timeout: float):
        from http.client import HTTPConnection  # here: it costs every step 30 ms

        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise GiveUp(f"url = {url!r}: expected http://host:port/predictions/<pipeline>")
        self.url, self.path = url, parts.path
        self.http = HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def ask(self, body: bytes) -> tuple[int, dict[str, object]]:
        """Status and JSON answer. Raises TryAgain if no answer comes."""
        from http.client import HTTPException

        try:
            self.http.request("POST", self.path, body, {"Content-Type": "application/octet-stream"})
            reply = self.http.getresponse()
            content = reply.read()
        except (OSError, HTTPException) as error:
            self.http.close()
            raise TryAgain(f"POST {self.url}: {type(error).__name__}: {error}") from error
        try:
            document = json.loads(content)
        except ValueError:
            document = {}
        return reply.status, document if isinstance(document, dict) else {}
