"""`make bench-goodput`: useful time under interruptions in compressed time, against the analytic optimum.

    python tests/training/bench_goodput.py [--seconds 60] [--mtbf 20] [--seeds 1,2,3]

A training is interrupted at random moments (exponential, from the seed; the same in both columns): without notice
(SIGKILL of a worker) and with notice (SIGTERM to the wrapper, which is started again at once). Its steps mostly sleep,
as a loop does that waits for its device, and nothing hides a stall. Goodput is the time that its steps need divided by
the wall clock from the first finished step to the last; a step's need is the mean of the steps of this run during which
no save was under way.

The optimum is the useful fraction of Young's first-order model (Young 1974, "A first order approximation to the optimum
checkpoint interval"; Daly 2006, "A higher order estimate", eq. 7 and before) for what was measured in this run: with W
seconds of steps, F interruptions, a stall C for each save and a restart R, saving every t seconds takes

    T(t) = W + (W / t) C + F (R + t / 2),        least at t = sqrt(2 C W / F); the optimum is W / min T.

It knows nothing of the time that a save needs to become durable (latency, Vaidya 1997): what is lost to that counts
against us. With notice nothing need be lost and no save be taken: T = W + F R. `parts` says where the wall clock went.
Exit 1 when goodput over all seeds is below 97 % of the optimum, or a step was lost despite notice.
Not covered: several nodes, and the time until a place has a new node (that is the platform's).
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
STEP = 0.05  # seconds of a step, about
BATCH = 12  # samples of two workers


def optimum(*, work: float, interruptions: float, stall: float, restart: float) -> float:
    """Goodput of the best interval between saves; seconds, see the module's docstring. A stall of 0: no steps lost."""
    lost = math.sqrt(2 * stall * work * interruptions)  # the least of work / t * stall + interruptions * t / 2
    return work / (work + interruptions * restart + lost)


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
        batch_size=BATCH,
        params={"slow": STEP * 2 / BATCH},
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


def stepping_since(lines: list[dict[str, Any]], *, attempt: int) -> float:
    """When that attempt (from 0) had taken its first step; 0.0 until then. Interruptions are drawn from there on: they
    belong to time that could have been used."""
    starts = [line["time"] for line in lines if line.get("event") == "worker" and line["rank"] == 0]
    if len(starts) <= attempt:
        return 0.0
    return next((line["time"] for line in lines if "loss" in line and line["time"] > starts[attempt]), 0.0)


def train(*, steps: int, mtbf: float, seed: int, notice: bool) -> dict[str, float]:
    """One training to its end through its interruptions; figures of goodput, stalls, restarts and lost steps."""
    chance = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="bench-goodput-"))
    environment = os.environ | {"REPRISE_PROGRESS_EVERY": "0", "PYTHONPATH": str(ROOT)}
    try:
        spec = make_spec(folder, steps=steps, mtbf=mtbf)
        command = [sys.executable, "-m", "training.launch", "--spec", str(spec), "--processes", "2"]
        command += ["--restarts", "1000", "--grace", "10"]
        progress, log = folder / "progress.jsonl", (folder / "log.txt").open("wb")
        kills: list[float] = []
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            next_kill = math.inf
            while True:
                time.sleep(0.01)
                code = process.poll()
                if code == 0:
                    break
                if code == 143 and notice:
                    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                elif code is not None:
                    raise RuntimeError(f"exit {code}: {(folder / 'log.txt').read_text()[-1000:]}")
                lines = read(progress)
                if any(line.get("event") == "complete" for line in lines):
                    next_kill = math.inf
                elif next_kill == math.inf and (at := stepping_since(lines, attempt=len(kills))):
                    next_kill = at + chance.expovariate(1 / mtbf)
                if time.time() >= next_kill and code is None:
                    kills.append(time.time())
                    workers = [line["pid"] for line in lines if line.get("event") == "worker"]
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid if notice else workers[-1], signal.SIGTERM if notice else signal.SIGKILL)
                    next_kill = math.inf
        finally:
            for pid in [process.pid, *descendants(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            log.close()
        return figures(read(progress), kills, steps=steps, notice=notice)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def figures(lines: list[dict[str, Any]], kills: list[float], *, steps: int, notice: bool) -> dict[str, float]:
    """What the progress file tells, from the first finished step to the last; seconds."""
    taken = [line for line in lines if "loss" in line]
    saves = []  # from when to when one was under way: until it was durable, or its worker was gone
    for line in lines:
        if line.get("event") == "saving":
            ends = (t["time"] for t in lines if t["time"] > line["time"] and t.get("event") in ("checkpoint", "worker"))
            saves.append((line["time"], next(ends, math.inf)))
    starts = [line["time"] for line in lines if line.get("event") == "worker"]
    calm, saving = [], []
    for a, b in itertools.pairwise(taken):
        if b["step"] != a["step"] + 1 or any(a["time"] < t < b["time"] for t in starts):
            continue  # a restart lies between
        under_way = any(begun < b["time"] and a["time"] < done for begun, done in saves)
        (saving if under_way else calm).append(b["time"] - a["time"])
    need = statistics.mean(calm)
    restarts, partial = [], 0.0
    for kill in kills:
        again = [line["time"] for line in lines if line.get("event") == "worker" and line["time"] > kill]
        later = [line["time"] for line in taken if again and line["time"] >= again[0]]
        if not later:
            continue  # it came in the training's last moment
        last = max(line["time"] for line in taken if line["time"] < (again[0] if notice else kill))
        restarts.append(later[0] - need - (last if notice else kill))
        partial += 0.0 if notice else kill - last
    wall, work = taken[-1]["time"] - taken[0]["time"], (steps - 1) * need
    found = {
        "wall": wall,
        "work": work,
        "interruptions": float(len(restarts)),
        "restart": statistics.mean(restarts) if restarts else 0.0,
        "stall": statistics.median(line["stall"] for line in lines if line.get("event") == "checkpoint"),
        "durable": statistics.median(line["durable"] for line in lines if line.get("event") == "checkpoint"),
        "saves": float(len(saves)),
        "lost steps": float(len(taken) - steps),
        "step": need,
        "median step": statistics.median(calm),
        "part restarts": sum(restarts),
        "part replayed": (len(taken) - steps) * need + partial,
        "part saving": sum(saving) - len(saving) * need,
    }
    found["part other"] = wall - work - sum(value for name, value in found.items() if name.startswith("part"))
    return found


def best(found: dict[str, float], *, notice: bool) -> float:
    """The optimum for these figures."""
    stall = 0.0 if notice else found["stall"]
    return optimum(work=found["work"], interruptions=found["interruptions"], stall=stall, restart=found["restart"])


def main() -> int:
    """The program of the module's docstring."""
    parser = argparse.ArgumentParser(description="Goodput under interruptions, against the analytic optimum.")
    parser.add_argument("--seconds", type=float, default=60.0, help="of steps in each training")
    parser.add_argument("--mtbf", type=float, default=20.0, help="seconds between interruptions")
    parser.add_argument("--seeds", default="1,2,3", help="one training each, in both columns")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing below is left behind
    steps = int(args.seconds / STEP) // 8 * 8
    columns: dict[str, list[dict[str, float]]] = {"without notice": [], "with notice": []}
    for seed in map(int, args.seeds.split(",")):
        for name, rounds in columns.items():
            notice = name == "with notice"
            found = train(steps=steps, mtbf=args.mtbf, seed=seed, notice=notice)
            found |= {"goodput": found["work"] / found["wall"], "optimum": best(found, notice=notice)}
            found["share"] = found["goodput"] / found["optimum"]
            rounds.append(found)
            print(f"seed {seed} {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(columns, indent=1))
    good = True
    for name, rounds in columns.items():
        total = {key: sum(found[key] for found in rounds) for key in rounds[0]}
        least = sum(found["work"] / found["optimum"] for found in rounds)
        share, lost = least / total["wall"], total["lost steps"]
        good &= share >= 0.97 and (name == "without notice" or lost == 0)
        parts = ", ".join(f"{key[5:]} {v / total['wall']:.2%}" for key, v in total.items() if key.startswith("part"))
        print(
            f"{name}: goodput {total['work'] / total['wall']:.2%}, optimum {total['work'] / least:.2%}, "
            f"share {share:.2%} (bar >= 97 %); {total['interruptions']:.0f} interruptions, {lost:.0f} steps lost; "
            f"beside the steps the wall clock went to: {parts}"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
