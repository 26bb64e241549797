"""What orchestration costs: Reprise beside bare Prefect, Metaflow and `dvc repro`, in rotating rounds of one run.

    make bench-flow            # or: .venv/bin/python tests/flows/bench_flow.py --rounds 5

The peers run six steps that do nothing, so their wall time is their overhead. Reprise runs its real chain (the tumours
example); its overhead is the wall time minus the steps' own seconds, which each step measures in itself. Figures are
ratios within a round; the medians are held against two bars. Not covered: what the steps do, memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

STEPS = ("pull", "train", "register", "package", "deploy", "check")
BIN = Path(sys.executable).parent

PREFECT = f"""
import os
from prefect import flow, task
from prefect.cache_policies import INPUTS, NO_CACHE, TASK_SOURCE
policy = INPUTS + TASK_SOURCE if os.environ.get("CACHED") else NO_CACHE
def step(name):
    @task(name=name, cache_policy=policy, persist_result=bool(os.environ.get("CACHED")))
    def body(x):
        return x
    return body
@flow
def pipeline():
    x = 0
    for name in {STEPS!r}:
        x = step(name)(x)
pipeline()
"""

METAFLOW = "from metaflow import FlowSpec, step\nclass Six(FlowSpec):\n" + "".join(
    f"    @step\n    def {name}(self):\n        self.next(self.{following})\n"
    for name, following in zip(("start", *STEPS[1:]), (*STEPS[1:], "end"), strict=True)
)
METAFLOW += "    @step\n    def end(self):\n        pass\nif __name__ == '__main__':\n    Six()\n"


class Peer:
    """One way to run six steps: `first` from nothing, `warm` doing all work, `unchanged` with nothing to do."""

    def __init__(
        self, name: str, first: Callable[[], float], warm: Callable[[], float], unchanged: Callable[[], float]
    ):
        self.name, self.first, self.warm, self.unchanged = name, first, warm, unchanged


def timed(argv: list[str], cwd: Path, env: dict[str, str]) -> float:
    """Wall seconds of a command; its output is shown when it fails."""
    began = time.perf_counter()
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(argv)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def reprise(folder: Path, env: dict[str, str], port: int) -> tuple[Peer, Callable[[], None]]:
    """The real chain on its own services; returns the peer and how to stop it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from flows.example import create_project

    create_project("tumours", folder)
    names = ("prefect", "mlflow", "inference", "management", "metrics", "grpc_inference", "grpc_management", "workers")
    ports = "\n".join(f"{name} = {port + n}" for n, name in enumerate(names))
    (folder / "laptop.toml").write_text(f'[place]\nkind = "laptop"\n[ports]\n{ports}\n')
    seed = [100]

    def run(*arguments: str) -> tuple[float, dict[str, object]]:
        began = time.perf_counter()
        argv = [str(BIN / "reprise"), "run", "--json", *arguments]
        done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - began
        if done.returncode:
            sys.exit(f"reprise run failed:\n{done.stdout[-1500:]}\n{done.stderr[-2000:]}")
        return wall, json.loads(done.stdout)

    def overhead() -> float:
        seed[0] += 1
        wall, document = run("--set", f"train.seed={seed[0]}", "--set", "gate.tolerance=1")
        own = sum(float(step["seconds"]) for step in document["steps"])  # type: ignore[attr-defined]
        return wall - own - float(document.get("report_seconds", 0.0))  # type: ignore[arg-type]

    def unchanged() -> float:
        wall, document = run("--set", f"train.seed={seed[0]}", "--set", "gate.tolerance=1")
        assert document["status"] == "unchanged", document["status"]
        return wall

    def down() -> None:
        subprocess.run([str(BIN / "reprise"), "down"], cwd=folder, env=env, capture_output=True, check=False)

    return Peer("reprise", overhead, overhead, unchanged), down


def prefect(folder: Path, env: dict[str, str], api: str) -> Peer:
    """Bare Prefect on the same running server."""
    folder.mkdir()
    (folder / "pipeline.py").write_text(PREFECT)
    env = {**env, "PREFECT_API_URL": api, "PREFECT_LOCAL_STORAGE_PATH": str(folder / "results")}
    argv = [sys.executable, "pipeline.py"]

    def warm() -> float:
        return timed(argv, folder, env)

    def unchanged() -> float:
        return timed(argv, folder, {**env, "CACHED": "1"})

    unchanged_first = unchanged  # fills the cache
    return Peer("prefect", lambda: (unchanged_first(), warm())[1], warm, unchanged)


def dvc(folder: Path, env: dict[str, str]) -> Peer:
    """`dvc repro` over six stages that depend on each other."""
    folder.mkdir()
    stages = ["stages:"]
    for n, name in enumerate(STEPS):
        deps = f"\n    deps: [out{n - 1}]" if n else ""
        stages.append(f"  {name}:\n    cmd: touch out{n}{deps}\n    outs: [out{n}]")
    (folder / "dvc.yaml").write_text("\n".join(stages) + "\n")
    run = [str(BIN / "dvc"), "repro", "-q"]

    def first() -> float:
        began = time.perf_counter()
        for argv in (["git", "init", "-q"], [str(BIN / "dvc"), "init", "-q"], run):
            timed(argv, folder, env)
        return time.perf_counter() - began

    return Peer("dvc repro", first, lambda: timed([*run, "-f"], folder, env), lambda: timed(run, folder, env))


def metaflow(folder: Path, env: dict[str, str], packages: Path) -> Peer | None:
    """Metaflow's local runtime, if `make bench-flow` installed it."""
    if not (packages / "metaflow").is_dir():
        return None
    folder.mkdir()
    (folder / "pipeline.py").write_text(METAFLOW)
    env = {**env, "PYTHONPATH": str(packages), "USERNAME": "bench", "METAFLOW_HOME": str(folder)}
    run = [sys.executable, "pipeline.py", "--quiet", "run"]
    resume = [sys.executable, "pipeline.py", "--quiet", "resume"]
    return Peer("metaflow", *(lambda a=argv: timed(a, folder, env) for argv in (run, run, resume)))  # type: ignore[misc]


def main() -> int:
    """Run the rounds, print the table and the bars; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=21000)
    parser.add_argument(
        "--peers", type=Path, default=Path(".bench"), help="folder with Metaflow, as pip --target made it"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the servers are stopped
    folder = Path(tempfile.mkdtemp(prefix="reprise-bench-"))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    env |= {"DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    ours, down = reprise(folder / "reprise", env, arguments.port)
    peers = [ours, prefect(folder / "prefect", env, f"http://127.0.0.1:{arguments.port}/api"), dvc(folder / "dvc", env)]
    if other := metaflow(folder / "metaflow", env, arguments.peers.absolute()):
        peers.append(other)
    else:
        print("metaflow: not installed; `make bench-flow` installs it")
    seconds: dict[str, dict[str, list[float]]] = {p.name: {"first": [], "warm": [], "unchanged": []} for p in peers}
    try:
        for peer in peers:
            seconds[peer.name]["first"].append(peer.first())
        for number in range(arguments.rounds):
            for peer in peers[number % len(peers) :] + peers[: number % len(peers)]:
                seconds[peer.name]["warm"].append(peer.warm())
                seconds[peer.name]["unchanged"].append(peer.unchanged())
            print(f"round {number + 1} of {arguments.rounds}", flush=True)
    finally:
        down()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{'overhead':<12}" + "".join(f"{column:>26}" for column in ("first", "warm", "unchanged")))
    for name, columns in seconds.items():
        cells = []
        for column, values in columns.items():
            ratio = statistics.median(v / p for v, p in zip(values, seconds["prefect"][column], strict=True))
            cells.append(f"{statistics.median(values):7.2f} s {ratio:6.2f} x Prefect")
        print(f"{name:<12}" + "".join(f"{cell:>26}" for cell in cells))
    return _bars(seconds)


def _bars(seconds: dict[str, dict[str, list[float]]]) -> int:
    def ratio(column: str, peer: str) -> float:
        pairs = zip(seconds["reprise"][column], seconds[peer][column], strict=True)
        return statistics.median(a / b for a, b in pairs)

    warm, unchanged, aim = ratio("warm", "prefect"), ratio("unchanged", "prefect"), ratio("unchanged", "dvc repro")
    bars = [
        ("overhead of a warm run, against bare Prefect", warm, 1.5, True),
        ("an unchanged run, against bare Prefect's all-cached one", unchanged, 1.0, True),
        ("an unchanged run, against dvc repro with nothing to do (an aim)", aim, 1.0, False),
    ]
    for text, value, bar, _ in bars:
        print(f"{'PASS' if value <= bar else 'MISS'}  {text}: {value:.2f}, at most {bar}")
    return int(any(value > bar for _, value, bar, binding in bars if binding))


if __name__ == "__main__":
    sys.exit(main())
