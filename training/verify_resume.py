"""The proof: train uninterrupted, train again with kills at random moments, compare every hash, write a certificate.

`python -m training.verify_resume --spec spec.json --kills 10 --seed 1 --output certificate.json`

Kills are drawn from the seed: SIGTERM or SIGKILL, at one worker, torchrun's agent or everything; while a save is on its
way, or at any moment of a step, also twice within an epoch. Some launches may restart killed workers themselves, others
leave it to the next launch; with --elastic each launch takes its own number of workers. The trainings run in a scratch
folder with their own checkpoints and without a metrics server.
Not covered: machines of another kind; two processors may round differently (the certificate names the one it ran on).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.launch import descendants
from training.progress import EVERY, PACE
from training.spec import EXIT_BAD_SPEC, EXIT_COMPLETE, EXIT_INTERRUPTED, TrainResult, TrainSpec, read_spec

TARGETS = ("worker", "agent", "everything")
PATIENCE = 300.0  # seconds without a line of progress after which a training counts as stuck
HASHES = ("weights_sha256", "optimizer_sha256", "order_sha256")


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One planned kill: what gets which signal, when."""

    target: str  # worker | agent | everything
    signal: str  # SIGTERM | SIGKILL
    moment: str  # step: `after` seconds past the first step of the attempt; save: past the start of a save
    after: float
    restarts: int  # how often the wrapper of that launch may restart workers by itself
    processes: int


@dataclass(kw_only=True)
class Launched:
    """A running training and what its progress file has told since it started."""

    process: subprocess.Popen[bytes]
    progress: Path
    offset: int
    lines: list[dict[str, Any]]

    def read(self) -> list[dict[str, Any]]:
        """New whole lines."""
        if not self.progress.exists():
            return []
        with self.progress.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        new = []
        for line in whole.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # half a line of a killed writer
                new.append(json.loads(line))
        self.lines += new
        return new

    def last(self, key: str) -> Any:
        """The newest value of that key in any line, or None."""
        return next((line[key] for line in reversed(self.lines) if key in line), None)


class NotEqual(Exception):
    """The interrupted training ended with other hashes, or did not end as it must."""


def plan_kills(seed: int, count: int, *, seconds: float, processes: int, elastic: bool) -> list[Kill]:
    """`count` kills drawn from the seed; `seconds` is how long the uninterrupted training takes."""
    chance = random.Random(seed)
    kinds = [(target, name) for target in TARGETS for name in ("SIGKILL", "SIGTERM")]
    chance.shuffle(kinds)
    kills = []
    for index in range(count):
        target, name = kinds[index % len(kinds)]
        save = index % 3 == 2
        # every other pair comes so early that it hits the epoch of the kill before it again
        reach = 0.02 if save else seconds * (0.5 / max(1, count) if index % 4 == 1 else 1.2 / max(1, count))
        kills.append(
            Kill(
                target=target,
                signal=name,
                moment="save" if save else "step",
                after=chance.uniform(0.0, reach),
                restarts=chance.choice((0, 3)),
                processes=chance.randint(1, processes) if elastic else processes,
            )
        )
    return kills


def verify(
    spec: TrainSpec, *, kills: int, seed: int, processes: int, elastic: bool, pace: float, grace: float = 20.0
) -> dict[str, Any]:
    """Run both trainings and return the certificate. Raises NotEqual with what differs."""
    scratch = Path(tempfile.mkdtemp(prefix="reprise-verify-"))
    began = time.time()
    try:
        shards = spec.shards or processes
        whole, seconds = uninterrupted(
            scratched(spec, scratch / "whole", shards), processes=processes, pace=pace, grace=grace
        )
        shutil.rmtree(scratch / "whole")
        plan = plan_kills(seed, kills, seconds=seconds, processes=processes, elastic=elastic)
        rounds: list[dict[str, Any]] = []
        while plan:  # a training that is over before all kills have come is followed by another
            folder = scratch / f"broken-{len(rounds)}"
            broken, done = interrupted(
                scratched(spec, folder, shards), plan, processes=processes, pace=pace, grace=grace
            )
            plan = plan[len(done) :]
            hashes = {name: getattr(broken, name) for name in HASHES}
            rounds.append({"kills": done, "attempts": broken.attempts, **hashes})
            shutil.rmtree(folder)
        expected = {name: getattr(whole, name) for name in HASHES}
        equal = all(done[name] == expected[name] for done in rounds for name in HASHES)
        certificate: dict[str, Any] = {
            "format": "reprise-resume-certificate-1",
            "equal": equal,
            "key": spec.key,
            "code_digest": spec.code_digest,
            "data_digest": spec.data_digest,
            "seed": seed,
            "processes": processes,
            "shards": shards,
            "elastic": elastic,
            "steps": whole.max_steps,
            "kills": sum(len(done["kills"]) for done in rounds),
            "uninterrupted": expected,
            "interrupted": rounds,
            "python": platform.python_version(),
            "torch": _torch_version(),
            "machine": platform.machine(),
            "created": time.time(),
            "seconds": round(time.time() - began, 1),
        }
        sealed = json.dumps(certificate, sort_keys=True).encode()
        return {**certificate, "sha256": hashlib.sha256(sealed).hexdigest()}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def scratched(spec: TrainSpec, folder: Path, shards: int) -> Path:
    """A spec file of the same training that writes into `folder` only."""
    folder.mkdir(parents=True)
    here = dataclasses.replace(
        spec,
        shards=shards,
        checkpoints=f"file://{folder}/checkpoints",
        output=str(folder / "output"),
        progress=str(folder / "progress.jsonl"),
        mlflow_uri="",
        mlflow_run="",
    )
    (folder / "spec.json").write_text(here.to_json())
    return folder / "spec.json"


def uninterrupted(spec_file: Path, *, processes: int, pace: float, grace: float) -> tuple[TrainResult, float]:
    """Train to the end; returns the result and the seconds from the first to the last step."""
    running = launch(spec_file, processes=processes, restarts=0, pace=pace, grace=grace)
    with ended(running):
        code = wait(running)
    if code != EXIT_COMPLETE:
        raise NotEqual(f"the uninterrupted training exited {code} instead of 0; its log is above")
    times = [line["time"] for line in running.lines if "loss" in line]
    return read_result(spec_file), times[-1] - times[0]


def interrupted(
    spec_file: Path, plan: list[Kill], *, processes: int, pace: float, grace: float
) -> tuple[TrainResult, list[dict[str, Any]]]:
    """Train to the end through the planned kills; returns the result and what each kill did."""
    done: list[dict[str, Any]] = []
    waiting = list(plan)
    while True:
        kill = waiting[0] if waiting else None
        running = launch(
            spec_file,
            processes=kill.processes if kill else processes,
            restarts=kill.restarts if kill else 3,
            pace=pace,
            grace=grace,
        )
        with ended(running):
            while waiting and aim(running, waiting[0]):
                hit = waiting.pop(0)
                at = running.last("step")
                strike(running, hit, done)
                done.append({**dataclasses.asdict(hit), "at_step": at})
                if hit.target == "everything" or hit.restarts == 0 or hit.signal == "SIGTERM":
                    break
            code = wait(running)
        if code == EXIT_COMPLETE:
            return read_result(spec_file), done
        if code not in (EXIT_INTERRUPTED, -signal.SIGKILL):
            raise NotEqual(
                f"after {done[-1] if done else 'no kill'} the training exited {code}; expected 0, 143 or a kill"
            )


def launch(spec_file: Path, *, processes: int, restarts: int, pace: float, grace: float) -> Launched:
    """Start the wrapper, in a session of its own."""
    command = [sys.executable, "-m", "training.launch", "--spec", str(spec_file)]
    progress = Path(json.loads(spec_file.read_text())["progress"])
    process = subprocess.Popen(
        [*command, "--processes", str(processes), "--restarts", str(restarts), "--grace", str(grace)],
        env=os.environ | {EVERY: "0", PACE: str(pace)},
        start_new_session=True,
    )
    offset = progress.stat().st_size if progress.exists() else 0
    return Launched(process=process, progress=progress, offset=offset, lines=[])


@contextlib.contextmanager
def ended(running: Launched) -> Iterator[None]:
    """Leave no process behind, whatever happens."""
    try:
        yield
    finally:
        if running.process.poll() is None:
            kill_tree(running.process.pid)
        running.process.wait()


def aim(running: Launched, kill: Kill) -> bool:
    """Wait for the kill's moment, in workers started since the last kill; False when the training ended before it."""
    alive, quiet = False, time.monotonic()
    while running.process.poll() is None:
        for line in running.read():
            quiet = time.monotonic()
            alive = alive or line.get("event") == "started"
            if alive and (line.get("event") == "saving" if kill.moment == "save" else "loss" in line):
                time.sleep(kill.after)
                running.read()
                return running.process.poll() is None
        if time.monotonic() - quiet > PATIENCE:
            raise NotEqual(f"no progress for {PATIENCE:g} s: the training is stuck")
        time.sleep(0.001)
    running.read()
    return False


def strike(running: Launched, kill: Kill, done: list[dict[str, Any]]) -> None:
    """Send the signal. A process that has just ended counts as hit."""
    number = signal.Signals[kill.signal]
    first = max(i for i, line in enumerate(running.lines) if line.get("event") == "started")
    started = running.lines[first]
    workers = {line["rank"]: line["pid"] for line in running.lines[first:] if line.get("event") == "worker"}
    if kill.target == "everything" and number == signal.SIGKILL:
        kill_tree(running.process.pid)
        return
    pid = {"worker": workers[len(done) % len(workers)], "agent": started["agent"]}.get(kill.target, running.process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and everything below it, as a node that vanishes."""
    for target in [pid, *descendants(pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)


def wait(running: Launched) -> int:
    """The exit code. Raises NotEqual when nothing moves for PATIENCE seconds."""
    quiet = time.monotonic()
    while running.process.poll() is None:
        if running.read():
            quiet = time.monotonic()
        if time.monotonic() - quiet > PATIENCE:
            raise NotEqual(f"no progress for {PATIENCE:g} s: the training is stuck")
        time.sleep(0.02)
    running.read()
    return running.process.returncode


def read_result(spec_file: Path) -> TrainResult:
    """The result of the training of that spec."""
    return TrainResult.read(Path(json.loads(spec_file.read_text())["output"]) / "result.json")


def _torch_version() -> str:
    from importlib.metadata import version

    return version("torch")


def main(argv: list[str] | None = None) -> int:
    """The program. Exit codes: 0 all hashes equal, 1 not equal, 2 a bad spec."""
    parser = argparse.ArgumentParser(prog="python -m training.verify_resume", description=__doc__)
    parser.add_argument("--spec", required=True, type=Path, help="train spec, a JSON file")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--processes", type=int, default=2, help="workers")
    parser.add_argument("--epochs", type=int, help="train fewer epochs than the spec says")
    parser.add_argument("--elastic", action="store_true", help="another number of workers at each launch")
    parser.add_argument("--pace", type=float, default=0.05, help="least seconds of a step, so that kills can aim")
    parser.add_argument("--grace", type=float, default=20.0, help="seconds that a notice leaves")
    parser.add_argument("--output", type=Path, help="file for the certificate; default: standard output")
    args = parser.parse_args(argv)
    try:
        spec = read_spec(args.spec)
    except ValueError as error:
        print(f"training.verify_resume: {error}", file=sys.stderr)
        return EXIT_BAD_SPEC
    spec = dataclasses.replace(spec, epochs=args.epochs or spec.epochs)
    try:
        certificate = verify(
            spec,
            kills=args.kills,
            seed=args.seed,
            processes=args.processes,
            elastic=args.elastic,
            pace=args.pace,
            grace=args.grace,
        )
    except NotEqual as error:
        print(f"training.verify_resume: {error}", file=sys.stderr)
        return 1
    text = json.dumps(certificate, indent=1, sort_keys=True)
    if args.output:
        args.output.write_text(text + "\n")
        told = "equal" if certificate["equal"] else "NOT EQUAL"
        print(f"{certificate['kills']} kills in {len(certificate['interrupted'])} trainings: {told}; {args.output}")
    else:
        print(text)
    return 0 if certificate["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
