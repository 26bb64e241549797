"""From a kill to the first new step: Reprise's warm standby beside plain torchrun's restart, in rotating rounds.

    python tests/training/bench_restart.py [--rounds 5] [--json FILE]

Both train the same spec with the same loop and the same checkpoints; one worker gets SIGKILL in the middle. Plain is
`torchrun --max-restarts=3 -m training.train` with torch's defaults; a third column gives plain torchrun what its own
documentation offers (monitor interval 0.1 s, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1). Parts: kill -> workers joined
(process start, imports, rendezvous, process group) -> resumed (model, data, checkpoint) -> first new step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from training.launch import descendants  # noqa: E402
from training.spec import CheckpointPolicy, TrainSpec  # noqa: E402

MODULE = Path(__file__).parent / "modules" / "tiny.py"
PATIENCE = 60.0  # seconds
RIVALS = {
    "reprise": ["-m", "training.launch", "--processes", "2", "--spec"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"],
    "torchrun, tuned": [
        *["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"],
        "--monitor-interval=0.1",
    ],
}


class NeverBack(Exception):
    """No first new step within the patience."""


def make_spec(folder: Path) -> Path:
    """A training long enough to be killed in its middle."""
    spec = TrainSpec(
        key="restart",
        pipeline="restart",
        module=str(MODULE),
        data=str(folder),
        checkpoints=f"file://{folder}/checkpoints",
        output=f"{folder}/output",
        progress=f"{folder}/progress.jsonl",
        epochs=1000,
        batch_size=12,
        params={"slow": 0.004},
        checkpoint=CheckpointPolicy(every_steps=10),
    )
    path = folder / "spec.json"
    path.write_text(spec.to_json())
    return path


@contextlib.contextmanager
def running(name: str, spec: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The trainer under its launcher; everything below it is ended afterwards."""
    command = [sys.executable, *RIVALS[name]]
    command += [str(spec)] if name == "reprise" else ["-m", "training.train", "--spec", str(spec)]
    environment = os.environ | {"REPRISE_PROGRESS_EVERY": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if name == "torchrun, tuned":
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with (spec.parent / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            for pid in [process.pid, *descendants(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def lines(spec: Path) -> list[dict[str, Any]]:
    """Whole lines of progress."""
    path = spec.parent / "progress.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def wait_for(spec: Path, condition: Any, process: subprocess.Popen[bytes]) -> Any:
    """The first true answer of `condition(lines)`; raises NeverBack after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if found := condition(lines(spec)):
            return found
        time.sleep(0.005)
    raise NeverBack(f"exit {process.poll()}; its log ends: {(spec.parent / 'log.txt').read_text()[-300:]}")


def measure(name: str) -> dict[str, float]:
    """Seconds of one cold start and one restart, in parts."""
    folder = Path(tempfile.mkdtemp(prefix="bench-restart-"))
    try:
        spec = make_spec(folder)
        began = time.time()
        with running(name, spec) as process:
            first = wait_for(spec, lambda told: next((t for t in told if "loss" in t), None), process)
            cold = first["time"] - began
            wait_for(spec, lambda told: any(t.get("event") == "checkpoint" and t["step"] >= 20 for t in told), process)
            time.sleep(0.2)
            worker = next(t for t in lines(spec) if t.get("event") == "worker" and t["rank"] == 1)
            killed = time.time()
            os.kill(worker["pid"], signal.SIGKILL)
            resumed = wait_for(spec, lambda told: next((t for t in told if t.get("event") == "resumed"), None), process)
            step = wait_for(
                spec, lambda told: next((t for t in told if "loss" in t and t["time"] > resumed["time"]), None), process
            )
            joined = max(t["time"] for t in lines(spec) if t.get("event") == "worker")
            return {
                "cold start": cold,
                "kill to joined": joined - killed,
                "joined to resumed": resumed["time"] - joined,
                "resumed to step": step["time"] - resumed["time"],
                "kill to step": step["time"] - killed,
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """The program: exit code 1 when the restart is not at least twice as fast as torchrun's in the same rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing below is left behind
    names = list(RIVALS)
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    never = dict.fromkeys(names, 0)
    for index in range(args.rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            if never[name]:  # once is enough
                continue
            try:
                figures[name].append(measure(name))
                print(f"round {index + 1} {name}: {figures[name][-1]['kill to step']:.2f} s", flush=True)
            except NeverBack as error:
                never[name] += 1
                print(f"round {index + 1} {name}: no new step within {PATIENCE:g} s ({error})", flush=True)
    parts = ("cold start", "kill to joined", "joined to resumed", "resumed to step", "kill to step")
    print(f"\n{'median seconds':18}" + "".join(f"{part:>20}" for part in parts))
    for name in (name for name in names if figures[name]):
        values = [statistics.median(one[part] for one in figures[name]) for part in parts]
        print(f"{name:18}" + "".join(f"{value:20.2f}" for value in values))
    ours = [one["kill to step"] for one in figures["reprise"]]
    ratios = {
        name: statistics.median(a["kill to step"] / b for a, b in zip(figures[name], ours, strict=False))
        for name in names[1:]
        if figures[name] and ours
    }
    for name, ratio in ratios.items():
        print(f"{name} takes {ratio:.1f} x as long from the kill to the first new step (median of ratios)")
    if args.json:
        args.json.write_text(json.dumps({"rounds": figures, "ratios": ratios, "never came back": never}, indent=1))
    return 0 if ours and all(ratio >= 2 for ratio in ratios.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
