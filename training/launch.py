"""The wrapper round torchrun: `python -m training.launch --spec spec.json --processes 2`.

torchrun exits 1 whatever happened, and 0 means only that processes ended. This process says what it was: 0 when the
checkpoint's manifest and result.json say that the training is complete, 143 after an interruption (also a lost peer or
a killed worker, once restarting here is used up), 1..127 for a bug. It forwards a SIGTERM as the notice that it is,
ends what has not left by itself within the grace, restarts workers that died without a notice, and leaves no process
behind: orphans, also those in sessions of their own, become its children (subreaper) and are killed.
Nodes: one by default; PET_* or MASTER_ADDR, RANK and WORLD_SIZE of a PyTorchJob are handed to torchrun.
Signals are taken before torch is imported. Not covered: pods and budgets (deployments, flows).
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # before the other imports: the first process of a pod hears only what it has a handler for
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))

import argparse
import contextlib
import ctypes
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from training.interruption import LAUNCHER, LEAVE_WITHIN, STATUS_DIR
from training.progress import Progress
from training.spec import EXIT_BAD_SPEC, EXIT_COMPLETE, EXIT_INTERRUPTED, EXIT_USER_ERROR, TrainSpec, read_spec
from training.standby import Agent, start_agent, warm_up

MARGIN = 2.0  # seconds of the grace kept for each layer's own end: worker, torchrun, this process
POLL = 0.05
ALONE = 5.0  # seconds after which an agent without workers is ended
ALONE_AMONG_NODES = 330.0  # the same where it may wait for other nodes: torch's exit barrier takes 300 s at most
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one incarnation of the workers ended: an exit code, why, and whether trying again here makes sense."""

    code: int
    reason: str
    again: bool = False


class Launch:
    """One attempt of a training on this node."""

    def __init__(
        self, *, spec: TrainSpec, spec_file: Path, processes: int, grace: float, restarts: int, nodes: tuple[str, ...]
    ) -> None:
        """`grace`: seconds between SIGTERM and SIGKILL that this process itself is given. `nodes`: torchrun's flags."""
        self.spec, self.spec_file, self.processes, self.grace = spec, spec_file, processes, grace
        self.restarts, self.nodes = restarts, nodes
        self.noticed_at: float | None = None
        self.agent: Agent | None = None
        self.progress = Progress(spec.progress)

    def run(self) -> int:
        """Train until complete, interrupted or broken; returns this process's exit code."""
        if is_complete(self.spec):
            print(f"training {self.spec.key[:12]} is complete already", flush=True)
            return EXIT_COMPLETE
        adopt_orphans()
        signal.signal(signal.SIGTERM, self._on_notice)
        signal.signal(signal.SIGINT, self._on_notice)
        os.environ["OMP_NUM_THREADS"] = str(self.spec.threads)  # read when torch is imported
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        warm_up(compiler=self.spec.compile)
        for incarnation in range(self.restarts + 1):
            ending = self._incarnation(incarnation)
            if not ending.again or self.noticed_at is not None:
                break
            self.progress.event("restarted", incarnation=incarnation + 1, reason=ending.reason)
            print(f"training.launch: {ending.reason}; starting the workers again", file=sys.stderr, flush=True)
        if ending.code != EXIT_COMPLETE:
            print(f"training.launch: exit {ending.code}: {ending.reason}", file=sys.stderr, flush=True)
        return ending.code

    def _on_notice(self, number: int, frame: FrameType | None) -> None:
        if self.noticed_at is None:
            self.noticed_at = time.time()
        if self.agent is not None:
            self.agent.send_signal(signal.SIGTERM)

    def _incarnation(self, number: int) -> Ending:
        """Start torchrun and its workers once and wait for their end."""
        status = Path(tempfile.mkdtemp(prefix="reprise-status-"))
        try:
            if self.noticed_at is None:
                self.agent = start_agent(self._torchrun(), self._environment(status), self.spec_file, status)
                if self.noticed_at is not None:  # it came while the agent was being started
                    self.agent.send_signal(signal.SIGTERM)
                self.progress.event("started", incarnation=number, agent=self.agent.pid, processes=self.processes)
                self._wait()
            end_descendants()
            return self._judge(read_statuses(status))
        finally:
            end_descendants()
            self.agent = None
            shutil.rmtree(status, ignore_errors=True)

    def _wait(self) -> None:
        """Until torchrun has ended, or the grace is over, or its workers are gone and it does not see it."""
        told = seen = False
        gone: float | None = None
        agent = self.agent
        assert agent is not None
        while agent.poll() is None:
            time.sleep(POLL)
            if self.noticed_at is not None:
                if not told:
                    self.progress.event("notice", at=self.noticed_at, grace=self.grace)
                    told = True
                if time.time() - self.noticed_at > self.grace - MARGIN / 2:
                    return
            # a worker killed in its very last moment leaves torch's agent waiting for its answer for ever
            if any(True for _ in descendants(agent.pid)):
                seen, gone = True, None
            elif seen:
                gone = gone or time.monotonic()
                if time.monotonic() - gone > (ALONE if "--nnodes=1" in self.nodes else ALONE_AMONG_NODES):
                    return

    def _judge(self, statuses: list[dict[str, Any]]) -> Ending:
        """Completion is what the manifest says; a bug beats a lost peer; the rest is an interruption."""
        if is_complete(self.spec):
            return Ending(code=EXIT_COMPLETE, reason="complete")
        bugs = [s for s in statuses if 0 < s["code"] < 128]
        if bugs:
            first = min(bugs, key=lambda s: float(s["time"]))
            return Ending(code=int(first["code"]), reason=f"worker {first['rank']}: {first['reason']}")
        if self.noticed_at is not None:
            return Ending(code=EXIT_INTERRUPTED, reason="interrupted by SIGTERM")
        told = {int(s["rank"]): s for s in statuses}
        if any(s["reason"] == "notice" for s in statuses):
            return Ending(code=EXIT_INTERRUPTED, reason="workers were told to leave and saved")
        code = self.agent.returncode if self.agent is not None else None
        if code is not None and code < 0:
            return Ending(code=EXIT_INTERRUPTED, reason=f"torchrun died of {signal.Signals(-code).name}", again=True)
        if len(told) < self.processes:
            return Ending(code=EXIT_INTERRUPTED, reason="a worker died without a word (killed?)", again=True)
        if all(s["reason"].startswith("peer lost") for s in statuses):
            return Ending(code=EXIT_INTERRUPTED, reason="a worker on another node is gone", again=True)
        return Ending(code=EXIT_USER_ERROR, reason=f"torchrun exited {code}, and the training is not complete")

    def _torchrun(self) -> list[str]:
        return [
            *self.nodes,
            f"--nproc-per-node={self.processes}",
            "--max-restarts=0",  # restarting is decided here: torchrun cannot tell a bug from a kill
            "--monitor-interval=0.1",
        ]

    def _environment(self, status: Path) -> Mapping[str, str]:
        return {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else a restart reads the dead workers' addresses
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # else the agent's look for GPUs spoils CUDA for forked workers
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(round(max(1.0, self.grace - 2 * MARGIN))),
            STATUS_DIR: str(status),
            LAUNCHER: str(os.getpid()),
            LEAVE_WITHIN: str(max(1.0, self.grace - 3 * MARGIN)),
        }


def is_complete(spec: TrainSpec) -> bool:
    """Whether the newest checkpoint's manifest says complete, and the result of that training is written."""
    try:
        result = json.loads((Path(spec.output) / "result.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    if result.get("key") != spec.key:
        return False
    from training.checkpoint_store import open_store
    from training.manifest import DamagedCheckpoint, read_manifest

    store = open_store(spec.checkpoints)
    for name in store.names():  # newest first
        with contextlib.suppress(DamagedCheckpoint, FileNotFoundError):
            manifest = read_manifest(store.read(name, "manifest.json"), name)
            return manifest.complete and manifest.step == result["step"]
    return False


def read_statuses(folder: Path) -> list[dict[str, Any]]:
    """What the workers that could still tell said about their end."""
    found = []
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(json.JSONDecodeError):
            found.append({**json.loads(path.read_text()), "rank": path.stem.removeprefix("rank-")})
    return found


def adopt_orphans() -> None:
    """Become the parent of whatever outlives its own (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int) -> Iterator[int]:
    """Process ids below `pid`, children before their parents' other children (from /proc)."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                yield child
                yield from descendants(child)


def end_descendants() -> None:
    """Kill and reap everything below this process; returns when nothing is left."""
    while True:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def node_flags(environment: Mapping[str, str]) -> tuple[str, ...]:
    """torchrun's flags for the nodes: what a PyTorchJob's environment says, else one node on a port of its own."""
    if any(name in environment for name in ("PET_NNODES", "PET_RDZV_ENDPOINT", "PET_MASTER_ADDR")):
        return ()  # torchrun reads PET_* itself
    if "MASTER_ADDR" in environment and "WORLD_SIZE" in environment:
        return (
            f"--nnodes={environment['WORLD_SIZE']}",
            f"--node-rank={environment.get('RANK', '0')}",
            f"--master-addr={environment['MASTER_ADDR']}",
            f"--master-port={environment.get('MASTER_PORT', '29500')}",
        )
    return ("--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost")


def main(argv: list[str] | None = None) -> int:
    """The program; exit codes as in training/spec.py."""
    parser = argparse.ArgumentParser(prog="python -m training.launch", description=__doc__)
    parser.add_argument("--spec", required=True, type=Path, help="train spec, a JSON file")
    parser.add_argument("--processes", type=int, default=1, help="workers on this node")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--restarts", type=int, default=3, help="times that killed workers are started again here")
    args = parser.parse_args(argv)
    try:
        if args.processes < 1:
            raise ValueError(f"--processes is {args.processes}; expected at least 1")
        spec = read_spec(args.spec)
    except ValueError as error:
        print(f"training.launch: {error}", file=sys.stderr)
        return EXIT_BAD_SPEC
    launch = Launch(
        spec=spec,
        spec_file=args.spec.resolve(),
        processes=args.processes,
        grace=args.grace,
        restarts=args.restarts,
        nodes=node_flags(os.environ),
    )
    return launch.run()


if __name__ == "__main__":
    sys.exit(main())
