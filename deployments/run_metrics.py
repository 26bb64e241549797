"""What Prometheus cannot know from nodes and pods: steps, interruptions and lost steps of each training, by run.

    python -m deployments.run_metrics --store /reprise/store --port 9401 --price spot=1.10 --price on-demand=3.20

Reads the store's documents (runs, ledgers, the trainers' progress) at every scrape and writes nothing, so it can be
started and killed at any time and its mount can be read-only. DCGM's samples carry the pod's label reprise.dev/key: the
`key` here, so the two are joined by it. Trainings that have been quiet for a while are left out, which bounds the
number of series; the totals by pipeline keep them. Not covered: GPU use (DCGM exporter), requests (TorchServe itself).
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # before the other imports: the first process of a pod hears only what it has a handler for
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from deployments.workload import INTERRUPTIONS

KEY_LENGTH = 12  # of the label reprise.dev/key
TAIL_BYTES = 65536  # of a progress file; its newest lines are what counts
ACTIVE_SECONDS = 6 * 3600.0
ERRORS = frozenset({"user_error", "out_of_memory"})


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric and its samples, (labels, value)."""

    name: str
    kind: str  # gauge | counter
    help: str
    samples: list[tuple[dict[str, str], float]] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """In the text format 0.0.4."""
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} {self.kind}"
        for labels, value in self.samples:
            inside = ",".join(f'{name}="{_escape(text)}"' for name, text in sorted(labels.items()))
            yield f"{self.name}{{{inside}}} {value!r}"


def collect(
    store: Path, prices: Mapping[str, float], now: float, active_seconds: float = ACTIVE_SECONDS
) -> list[Metric]:
    """The metrics of a store at the moment `now` (unix seconds). Documents that are half there are left out."""
    step = Metric(name="reprise_training_step", kind="gauge", help="Last step that the trainer told of.")
    steps = Metric(name="reprise_training_steps", kind="gauge", help="Steps of the whole training.")
    told = Metric(
        name="reprise_training_progress_timestamp_seconds", kind="gauge", help="When the trainer last told something."
    )
    stall = Metric(
        name="reprise_training_checkpoint_stall_seconds",
        kind="gauge",
        help="What the last checkpoint held training up.",
    )
    apart = Metric(
        name="reprise_training_checkpoint_timestamp_seconds",
        kind="gauge",
        help="When the last checkpoint was made.",
    )
    running = Metric(name="reprise_training_running", kind="gauge", help="1 while an attempt is open in the ledger.")
    attempts = Metric(name="reprise_training_attempts", kind="gauge", help="Attempts of the training so far.")
    ended = Metric(
        name="reprise_training_attempts_ended", kind="gauge", help="Attempts of the training that ended, by cause."
    )
    lost = Metric(name="reprise_training_steps_lost", kind="gauge", help="Steps trained and not kept.")
    totals: dict[str, Counter[tuple[str, str]]] = {name: Counter() for name in ("ended", "seconds", "lost")}
    runs = _runs_of_trainings(store)
    for path in sorted((store / "trainings").glob("*/attempts.json")):
        rows = _json(path)
        if not isinstance(rows, list) or not rows:
            continue
        key = path.parent.name
        run, pipeline = runs.get(key, ("", ""))
        labels = {"key": key[:KEY_LENGTH], "pipeline": pipeline, "run": run}
        causes = Counter(row["cause"] for row in rows if row.get("ended") is not None)
        steps_lost = sum(max(0, row["reached_step"] - row["to_step"]) for row in rows if row.get("ended") is not None)
        totals["lost"][pipeline, ""] += steps_lost
        for cause, count in causes.items():
            totals["ended"][pipeline, cause] += count
        for row in rows:
            totals["seconds"][pipeline, row["capacity"]] += int((row.get("ended") or now) - row["started"])
        lines = list(_progress(path.with_name("progress.jsonl")))
        last = float(lines[-1].get("time", 0)) if lines else float(rows[-1].get("ended") or rows[-1]["started"])
        if now - last > active_seconds:
            continue
        attempts.samples.append((labels, len(rows)))
        running.samples.append(
            ({**labels, "capacity": str(rows[-1]["capacity"])}, float(rows[-1].get("ended") is None))
        )
        lost.samples.append((labels, steps_lost))
        told.samples.append((labels, last))
        for cause in sorted(INTERRUPTIONS | (set(causes) & ERRORS)):
            ended.samples.append(({**labels, "cause": cause}, causes[cause]))
        for line in reversed(lines):
            if "max_steps" in line:
                step.samples.append((labels, line["step"]))
                steps.samples.append((labels, line["max_steps"]))
                break
        for line in reversed(lines):
            if line.get("event") == "checkpoint":
                stall.samples.append((labels, line.get("stall", 0.0)))
                apart.samples.append((labels, line["time"]))
                break
    return [step, steps, told, stall, apart, running, attempts, ended, lost, *_totals(totals), _prices(prices)]


def text(metrics: Sequence[Metric]) -> str:
    """What a scrape gets."""
    return "\n".join(line for metric in metrics for line in metric.lines()) + "\n"


def _totals(totals: Mapping[str, Counter[tuple[str, str]]]) -> Iterator[Metric]:
    told = (
        ("ended", "reprise_attempts_ended_total", "cause", "Attempts that have ended, by cause."),
        ("seconds", "reprise_attempt_seconds_total", "capacity", "Seconds of all attempts, by capacity type."),
        ("lost", "reprise_steps_lost_total", "", "Steps trained and not kept."),
    )
    for name, metric, label, help_text in told:
        counted = sorted(totals[name].items())
        samples = [({"pipeline": p} | ({label: v} if label else {}), float(n)) for (p, v), n in counted]
        yield Metric(name=metric, kind="counter", help=help_text, samples=samples)


def _prices(prices: Mapping[str, float]) -> Metric:
    samples = [({"capacity": capacity}, price) for capacity, price in sorted(prices.items())]
    return Metric(
        name="reprise_gpu_price_per_hour", kind="gauge", help="Price of a GPU, as the overlay says.", samples=samples
    )


def _runs_of_trainings(store: Path) -> dict[str, tuple[str, str]]:
    """Training key -> the run that does it (or did; else the newest that asked for it), and its pipeline."""
    found: dict[str, tuple[bool, float, str, str]] = {}
    for path in (store / "runs").glob("[!.]*.json"):
        document = _json(path)
        if not isinstance(document, dict):
            continue
        for step in document.get("steps", ()):
            if step.get("name") == "train_model" and step.get("key"):
                does = not step.get("reused", False)
                row = (does, float(document["started"]), str(document["run"]), str(document["pipeline"]))
                found[step["key"]] = max(found.get(step["key"], row), row)
    return {key: (run, pipeline) for key, (_, _, run, pipeline) in found.items()}


def _progress(path: Path) -> Iterator[dict[str, Any]]:
    """The newest lines of a progress file, oldest first; a line that is half there is left out."""
    try:
        with path.open("rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(max(0, size - TAIL_BYTES))
            rows = handle.read().splitlines()
    except FileNotFoundError:
        return
    for row in rows[1:] if size > TAIL_BYTES else rows:
        try:
            line = json.loads(row)
        except ValueError:
            continue
        if isinstance(line, dict) and "time" in line:
            yield line


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None  # replaced this moment


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def serve(store: Path, prices: Mapping[str, float], host: str, port: int, active_seconds: float) -> ThreadingHTTPServer:
    """A server that is bound and not yet running: /metrics, and /healthz, which is 200 when the store can be listed."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = 404, "expected /metrics or /healthz\n"
            if self.path == "/metrics":
                status, body = 200, text(collect(store, prices, time.time(), active_seconds))
            elif self.path == "/healthz":
                there = store.is_dir()
                status, body = (200, "ok\n") if there else (503, f"{store}: not there; is the volume mounted?\n")
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            """A line per scrape tells nobody anything."""

    return ThreadingHTTPServer((host, port), Handler)


def _price(value: str) -> tuple[str, float]:
    capacity, sign, amount = value.partition("=")
    try:
        if not sign or float(amount) < 0:
            raise ValueError
        return capacity, float(amount)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r}: expected CAPACITY=PRICE, such as spot=1.10") from None


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments.run_metrics",
        description="Steps, interruptions and lost steps of trainings, for Prometheus.",
    )
    parser.add_argument("--store", type=Path, required=True, help="the store's folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9401)
    parser.add_argument("--price", type=_price, action="append", default=[], help="per GPU and hour: spot=1.10")
    parser.add_argument("--active", type=float, default=ACTIVE_SECONDS, help="seconds until a quiet one is left out")
    told = parser.parse_args()
    serve(told.store, dict(told.price), told.host, told.port, told.active).serve_forever()


if __name__ == "__main__":
    main()
