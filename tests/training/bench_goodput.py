"""Goodput under interruptions in compressed time, against the analytic optimum for the measured stall and restart.

    python tests/training/bench_goodput.py [--seconds 120] [--mtbf 20] [--seed 1]

A training of paced steps is interrupted at random moments (exponential, the same in both columns): without notice
(SIGKILL of a worker) and with notice (SIGTERM to the wrapper, which is started again at once). Goodput is the time that
the steps themselves take (their median, in this run) divided by the wall clock. The optimum is the best interval's for
the interruptions that came and the stall and restart that were measured: steps + interruptions x (restart + half an
interval) + saves x stall.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))


from training.launch import descendants  # noqa: E402
from training.spec import CheckpointPolicy, TrainSpec  # noqa: E402

MODULE = Path(__file__).parent / "modules" / "tiny.py"
PACE = 0.05  # seconds of a step


def optimum(*, work: float, interruptions: float, stall: float, restart: float) -> float:
    """Goodput of the best possible interval between saves; with `interruptions` = 0 it is 1."""
    costs = []
    for steps in range(1, 1 + int(work / PACE)):
        interval = steps * PACE
        costs.append(interruptions * (restart + interval / 2) + work / interval * stall)
    return work / (work + (min(costs) if interruptions else 0.0))


def make_spec(folder: Path, *, steps: int, mtbf: float) -> Path:
    """A training of that many steps, saved as Reprise decides."""
    spec = TrainSpec(
        key="goodput",
        pipeline="goodput",
        module=str(MODULE),
        data=str(folder),
        checkpoints=f"file://{folder}/checkpoints",
        output=f"{folder}/output",
        progress=f"{folder}/progress.jsonl",
        epochs=steps // 8,
        batch_size=12,
        checkpoint=CheckpointPolicy(min_seconds=0.05, max_seconds=mtbf, mtbf_seconds=mtbf),
    )
    path = folder / "spec.json"
    path.write_text(spec.to_json())
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Whole lines of progress."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def train(*, steps: int, mtbf: float, seed: int, notice: bool) -> dict[str, float]:
    """One training to its end through its interruptions; figures of goodput, stalls, restarts and lost steps."""
    chance = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="bench-goodput-"))
    environment = os.environ | {"REPRISE_PACE": str(PACE), "REPRISE_PROGRESS_EVERY": "0", "PYTHONPATH": str(ROOT)}
    try:
        spec = make_spec(folder, steps=steps, mtbf=mtbf)
        command = [sys.executable, "-m", "training.launch", "--spec", str(spec), "--processes", "2"]
        command += ["--restarts", "1000", "--grace", "10"]
        progress, log = folder / "progress.jsonl", (folder / "log.txt").open("wb")
        kills: list[float] = []
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            next_kill, before = math.inf, 0
            while True:
                time.sleep(0.01)
                code = process.poll()
                if code == 0:
                    break
                if code == 143 and notice:
                    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                    next_kill, before = math.inf, len(read(progress))  # the next one comes while steps are taken
                elif code is not None:
                    raise RuntimeError(f"exit {code}: {(folder / 'log.txt').read_text()[-1000:]}")
                lines = read(progress)
                if next_kill == math.inf and any("loss" in line for line in lines[before:]):
                    next_kill = time.time() + chance.expovariate(1 / mtbf)
                if any(line.get("event") == "complete" for line in lines):
                    next_kill = math.inf
                if time.time() >= next_kill and code is None:
                    kills.append(time.time())
                    next_kill = time.time() + chance.expovariate(1 / mtbf)
                    workers = [line["pid"] for line in lines if line.get("event") == "worker"]
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid if notice else workers[-1], signal.SIGTERM if notice else signal.SIGKILL)
        finally:
            for pid in [process.pid, *descendants(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            log.close()
        return figures(read(progress), kills, steps=steps)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def figures(lines: list[dict[str, Any]], kills: list[float], *, steps: int) -> dict[str, float]:
    """What the progress file tells: from the first finished step to the last."""
    taken = [line for line in lines if "loss" in line]
    wall = taken[-1]["time"] - taken[0]["time"]
    restarts = []
    for kill in kills:
        later = [line["time"] for line in taken if line["time"] > kill + PACE]
        resumed = [line["time"] for line in lines if line.get("event") == "resumed" and line["time"] > kill]
        if resumed and any(t >= resumed[0] for t in later):
            restarts.append(min(t for t in later if t >= resumed[0]) - PACE - kill)
    gaps = [b["time"] - a["time"] for a, b in itertools.pairwise(taken) if b["step"] == a["step"] + 1]
    work = (steps - 1) * statistics.median(gaps)
    stalls = [line["stall"] for line in lines if line.get("event") == "checkpoint"]
    return {
        "goodput": work / wall,
        "work": work,
        "wall": wall,
        "interruptions": float(len(kills)),
        "stall": statistics.median(stalls),
        "restart": statistics.mean(restarts) if restarts else 0.0,
        "lost steps": float(len(taken) - steps),
        "saves": float(len(stalls)),
    }


def main() -> int:
    """The program: exit code 1 when goodput is below 97 % of the optimum, or a step was lost despite notice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="of steps, without interruptions")
    parser.add_argument("--mtbf", type=float, default=20.0, help="seconds between interruptions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing below is left behind
    steps = int(args.seconds / PACE) // 8 * 8
    document = {}
    for name, notice in (("without notice", False), ("with notice", True)):
        found = train(steps=steps, mtbf=args.mtbf, seed=args.seed, notice=notice)
        best = optimum(
            work=found["work"],
            interruptions=found["interruptions"],
            stall=0.0 if notice else found["stall"],
            restart=found["restart"],
        )
        found |= {"optimum": best, "share": found["goodput"] / best}
        document[name] = found
        print(name + ": " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(document, indent=1))
    fine = document["without notice"]["share"] >= 0.97 and document["with notice"]["lost steps"] == 0
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
