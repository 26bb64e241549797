"""Rollouts in a row under steady clients, good models and bad ones, and a server that is killed: what clients noticed.

    make bench-serving        or: python tests/tasks/bench_serving.py [--rollouts 20] [--clients 16] [--rate 3]

Real TorchServe; the registry's alias API is the tests' stub. Each bad kind must end rolled back by itself, each answer
must be the torch model's of the version that it names, and no bad version may ever answer. Latencies are the clients'.
Steady and during-rollout figures come from one run on one machine: their ratio means something, they alone little.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from deployments.errors import StepError
from deployments.torchserve_launch import champions
from tasks.audit_endpoint import AuditRequest, audit_endpoint
from tasks.deploy_model import DeployRequest, RollbackRequest, deploy_model, roll_back
from tasks.golden import percentile, read_golden
from tests.tasks.serving_kit import (
    MODULE,
    Registry,
    Serving,
    Toy,
    deploy_request,
    make_toy,
    package,
    registry,
    torchserve,
)

LINEAR = "return torch.nn.Linear(4, 3)"
BAD = {
    "crash loop": MODULE.replace(LINEAR, "import os; os._exit(3)"),
    "raises": MODULE.replace("shares = ", "raise KeyError('x')\n    shares = "),
    "slow": MODULE.replace("values = ", "import time; time.sleep(0.7); values = "),
    "flipped labels": MODULE,
    "corrupt .mar": MODULE,
    "missing import": "import no_such_package\n" + MODULE,
}
START_SECONDS, P95_SECONDS = 90.0, 0.5


@dataclass
class Seen:
    """What one rollout did."""

    kind: str
    began: float
    ended: float
    outcome: str
    why: str = ""


@dataclass
class Figures:
    """Everything measured, printed as JSON at the end."""

    rollouts: list[Seen] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


@contextmanager
def load(url: str, heldout: Path, clients: int, rate: float, out: Path) -> Iterator[None]:
    """Clients as long as the block runs; their requests are in `out` afterwards."""
    argv = [
        sys.executable,
        str(Path(__file__).with_name("load.py")),
        url,
        str(heldout),
        str(clients),
        str(rate),
        str(out),
    ]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    process.stdout.readline()
    try:
        yield
    finally:
        process.stdin.close()
        process.wait(60)


class Bench:
    """One server, its versions, and the truth of each."""

    def __init__(self, folder: Path, serving: Serving, aliases: Registry):
        self.folder, self.serving, self.aliases = folder, serving, aliases
        self.record = folder / "store" / "endpoints"
        self.truth: dict[str, list[Any]] = {}  # MLflow version -> label per sample, of versions that may answer

    def toy(self, version: int, kind: str) -> Toy:
        return make_toy(
            self.folder / f"toy{version}", seed=version, module=BAD.get(kind, MODULE), flipped=kind == "flipped labels"
        )

    def request(self, version: int, kind: str) -> DeployRequest:
        toy = self.toy(version, kind)
        asked, packaged = package(toy, self.serving.store, version)
        request = deploy_request(
            asked, packaged, toy.heldout, self.serving.server, self.aliases.uri, self.record,
            start_seconds=START_SECONDS, max_p95_seconds=P95_SECONDS, soak_seconds=1.0,
            server_logs=str(self.serving.state / "logs"),
        )  # fmt: skip
        if kind == "corrupt .mar":
            mar = Path(request.mar)
            data = bytearray(mar.read_bytes())
            data[len(data) // 2] ^= 0xFF
            mar.write_bytes(bytes(data))
            import hashlib

            return replace(request, sha256=hashlib.sha256(data).hexdigest())  # so that the validator has to see it
        if kind == "good":
            self.truth[str(version)] = [sample.answer["label"] for sample in read_golden(toy.heldout)]
        return request

    def audit(self) -> list[str]:
        server = self.serving.server
        audit = audit_endpoint(
            AuditRequest(
                pipeline="toy", management_url=server.management_url, inference_url=server.inference_url,
                tracking_uri=self.aliases.uri, record=str(self.record),
            )
        )  # fmt: skip
        return [f"{finding.what}: {finding.found}" for finding in audit.findings]


def plan(rollouts: int) -> list[str]:
    """Alternating: a good one, then a bad one, through all the bad kinds in turn."""
    kinds = list(BAD)
    return ["good" if number % 2 == 0 else kinds[number // 2 % len(kinds)] for number in range(rollouts)]


def run(rollouts: int, clients: int, rate: float, steady: float, port: int) -> Figures:
    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as name, registry() as aliases:
        folder = Path(name)
        with torchserve(folder, port) as serving:
            bench = Bench(folder, serving, aliases)
            first = bench.request(1, "good")
            endpoint = deploy_model(first)
            requests = [(kind, bench.request(n + 2, kind)) for n, kind in enumerate(plan(rollouts))]
            rows_file = folder / "rows.jsonl"
            with load(endpoint.url, Path(first.golden), clients, rate, rows_file):
                time.sleep(3)  # warm
                began = time.time()
                time.sleep(steady)
                calm = (began, time.time())
                for kind, request in requests:
                    figures.rollouts.append(one(kind, request))
                    print(json.dumps(vars(figures.rollouts[-1])), flush=True)
                    if found := bench.audit():
                        raise SystemExit(f"audit after {kind}: {found}")
                    time.sleep(1)
                began = time.time()
                server = serving.server
                back = roll_back(
                    RollbackRequest(
                        pipeline="toy", management_url=server.management_url, inference_url=server.inference_url,
                        tracking_uri=aliases.uri, record=str(bench.record),
                    )
                )  # fmt: skip
                figures.rollouts.append(
                    Seen("rollback", began, time.time(), "in service", f"to version {back.version}")
                )
            rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
            figures.summary = judge_rows(rows, bench, figures.rollouts, calm) | {"clients": clients, "rate_each": rate}
            figures.summary["server killed"] = killed(bench, folder, endpoint.url, Path(first.golden), clients, rate)
    return figures


def one(kind: str, request: DeployRequest) -> Seen:
    """One rollout; a bad one has to be refused."""
    began = time.time()
    try:
        deploy_model(request)
        outcome, why = "in service", ""
    except StepError as error:
        outcome, why = "rolled back", str(error)
    if (outcome == "in service") != (kind == "good"):
        raise SystemExit(f"a rollout of kind {kind!r} ended {outcome}: {why}")
    return Seen(kind, began, time.time(), outcome, why)


def judge_rows(rows: list[list[Any]], bench: Bench, rollouts: list[Seen], calm: tuple[float, float]) -> dict[str, Any]:
    """Failed and wrong answers over everything; latencies steady and while a rollout was under way."""
    failed = [row for row in rows if row[2] != 200]
    wrong = [r for r in rows if r[2] == 200 and (r[3] not in bench.truth or bench.truth[r[3]][r[5]] != r[4])]
    quiet = [row[1] for row in rows if calm[0] <= row[0] < calm[1]]
    busy = [row[1] for row in rows if any(seen.began <= row[0] < seen.ended for seen in rollouts)]
    good = [row[1] for row in rows if any(s.kind == "good" and s.began <= row[0] < s.ended for s in rollouts)]
    refused = [seen for seen in rollouts if seen.outcome == "rolled back"]
    return {
        "rollouts": len(rollouts),
        "requests": len(rows),
        "failed": len(failed),
        "wrong_answers": len(wrong),
        "versions_that_answered": sorted({row[3] for row in rows if row[2] == 200}, key=int),
        "steady_ms": tail(quiet),
        "during_rollouts_ms": tail(busy),
        "during_good_rollouts_ms": tail(good),
        "p99_during_over_steady": round(percentile(busy, 0.99) / percentile(quiet, 0.99), 2),
        "seconds_of_a_good_rollout": round(
            percentile([s.ended - s.began for s in rollouts if s.kind == "good"], 0.5), 1
        ),
        "seconds_to_roll_back_by_kind": {
            kind: round(percentile([s.ended - s.began for s in refused if s.kind == kind], 0.5), 1) for kind in BAD
        },
        "seconds_of_a_rollback_asked_for": round(rollouts[-1].ended - rollouts[-1].began, 1),
    }


def killed(bench: Bench, folder: Path, url: str, heldout: Path, clients: int, rate: float) -> dict[str, Any]:
    """kill -9 of the JVM under load; started again at once with what the record has in service."""
    rows_file = folder / "killed.jsonl"
    before = json.loads((bench.record / "toy.json").read_text())["serving"]
    port = int(url.split(":")[2].split("/")[0])
    with load(url, heldout, clients, rate, rows_file):
        time.sleep(3)
        died = time.time()
        os.kill(bench.serving.jvm(), signal.SIGKILL)
        bench.serving.process.wait()
        with torchserve(folder, port, models=champions(bench.record)) as again:
            bench.serving = again
            while not any(found.ready for found in again.server.versions("toy")):
                time.sleep(0.05)
            time.sleep(4)
            findings = bench.audit()
            label = next(found.label for found in again.server.versions("toy") if found.default)
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    after = [row for row in rows if row[0] > died and row[2] == 200]
    window = [row for row in rows if row[0] < died + 60]
    return {
        "same_version": label == before["label"],
        "audit": findings,
        "failed_requests": sum(row[2] != 200 for row in window if row[0] + row[1] < max(r[0] for r in after)),
        "seconds_without_an_answer": round(min(row[0] + row[1] for row in after) - died, 1),
        "wrong_answers": sum(bench.truth[row[3]][row[5]] != row[4] for row in rows if row[2] == 200),
    }


def tail(seconds: list[float]) -> dict[str, Any]:
    """Percentiles in milliseconds."""
    figures = {f"p{share:g}": round(percentile(seconds, share / 100) * 1000, 1) for share in (50, 95, 99)}
    return {**figures, "max": round(max(seconds) * 1000, 1), "requests": len(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3.0, help="requests per second of each client")
    parser.add_argument("--steady", type=float, default=20.0, help="seconds of load without a rollout")
    parser.add_argument("--port", type=int, default=18100, help="first of five")
    given = parser.parse_args()
    figures = run(given.rollouts, given.clients, given.rate, given.steady, given.port)
    print(json.dumps(figures.summary, indent=1))
    bad = figures.summary["failed"] or figures.summary["wrong_answers"] or figures.summary["server killed"]["audit"]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
