"""From a push to the trainer's first step: each part as a multiple of the bare training command's way to that step.

    make bench-trigger         # or: .venv/bin/python tests/flows/bench_trigger.py --rounds 3

Real Prefect, worker and receiver; each round pushes a changed parameter and takes the times from the queue, Prefect's
states, the run's document and the trainer's own file. Then the same training is started bare, by the command that the
flow gave its job, in the same round, so that a busy machine slows both. Parts add up to the whole; the pause for newer
pushes ([push] settle, here 1 s) is one. Not covered: the forge's own delay, a cold start of the services.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.flows.push_kit import payload
from tests.flows.triggers.laptop_kit import Project, Receiver, decided

PARTS = (
    "answered (202)",
    "settled and decided",
    "handed over, noticed by the worker",
    "flow's process and Prefect's imports",
    "plan, services, pull",
    "trainer to its first step",
)


def unix(text: str) -> float:
    """Prefect's time."""
    return datetime.datetime.fromisoformat(text).timestamp()


def first_step(progress: Path) -> float:
    """When the trainer told of its first step; 0 before it did."""
    try:
        lines = progress.read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(e["time"]) for e in map(json.loads, lines) if "loss" in e), 0.0)


def measure(project: Project, receiver: Receiver, number: int) -> dict[str, Any]:
    """One push: seconds of each part, and those of the bare command."""
    before, after = project.change(f"seed = {number}", f"seed = {number + 1}")
    pushed = time.time()
    receiver.post(payload(before, after))
    answered = time.time()
    flow_run = decided(project, after)["flow_run"]
    project.wait(flow_run, "Completed", seconds=300)
    states = {
        s["name"]: unix(s["timestamp"])
        for s in project.prefect.call("GET", f"/flow_run_states/?flow_run_id={flow_run}")
    }
    document = project.document(flow_run)
    key = next(s["key"] for s in document["steps"] if s["name"] == "train_model")
    launched = document["attempts"][0]["started"]
    stepped = first_step(project.store / "trainings" / key / "progress.jsonl")
    times = [pushed, answered, states["Scheduled"], states["Pending"], states["Running"], launched, stepped]
    parts = {name: later - earlier for name, earlier, later in zip(PARTS, times[:-1], times[1:], strict=True)}
    return {**parts, "whole": stepped - pushed, "bare": bare(project, key)}


def bare(project: Project, key: str) -> float:
    """The job's own command once more, into a folder of its own, without MLflow: seconds to its first step."""
    job = project.folder / ".reprise" / "jobs" / f"train-{key[:12]}-1"
    argv = json.loads((job / "start.json").read_text())["argv"]
    folder = Path(tempfile.mkdtemp(dir=project.root))
    spec = json.loads((job / "request.json").read_text())
    spec |= {"checkpoints": f"file://{folder}/checkpoints", "output": f"{folder}/output", "mlflow_uri": ""}
    spec["progress"] = str(folder / "progress.jsonl")
    (folder / "spec.json").write_text(json.dumps(spec))
    argv[argv.index("--spec") + 1] = str(folder / "spec.json")
    began = time.time()
    subprocess.run(argv, cwd=folder, capture_output=True, check=True)
    return first_step(folder / "progress.jsonl") - began


def main() -> None:
    """Measure, print the table, and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    root = Path(tempfile.mkdtemp(prefix="bench-trigger-"))
    project = Project(root)
    receiver = Receiver(project)
    try:
        project.command("up")
        project.command("deploy")
        receiver.start()
        found = [measure(project, receiver, 7 + n) for n in range(rounds + 1)][1:]  # the first one warms up
    finally:
        receiver.kill()
        project.command("down")
        shutil.rmtree(root, ignore_errors=True)
    found = [{**row, "overhead of Reprise": row["whole"] - row["bare"]} for row in found]
    medians = {name: statistics.median(row[name] for row in found) for name in found[0]}
    ratios = {name: statistics.median(row[name] / row["bare"] for row in found) for name in found[0]}
    print(f"medians of {rounds} pushes after one to warm up; 1 is the bare command to its first step")
    for name, ratio in ratios.items():
        print(f"  {name:<38} {ratio:6.2f}   {medians[name]:6.2f} s")
    print(json.dumps({"rounds": found, "medians": medians, "ratios": ratios}))


if __name__ == "__main__":
    main()
