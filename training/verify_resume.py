"""The proof: train uninterrupted, train again with kills at random moments, compare every hash, write a certificate.

`python -m training.verify_resume --spec spec.json --kills 10 --seed 1 --output certificate.json`

Kills of every kind (training/kills.py) are drawn from the seed; with --elastic each launch takes its own number of
workers. The trainings run in a scratch folder with their own checkpoints and without a metrics server.
Not covered: what the certificate says (training/certificate.py); machines of another kind: two processors may round
differently (the certificate names the one it ran on).
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # before the other imports: the first process of a pod hears only what it has a handler for
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from training.certificate import certify, one_round
from training.kills import Kill, Stuck, aim, ended, launch, plan_kills, strike, wait
from training.spec import EXIT_BAD_SPEC, EXIT_COMPLETE, EXIT_INTERRUPTED, TrainResult, TrainSpec, read_spec


class NotEqual(Exception):
    """The interrupted training ended with other hashes, or did not end as it must."""


def verify(
    spec: TrainSpec, *, kills: int, seed: int, processes: int, elastic: bool, pace: float, grace: float = 20.0
) -> dict[str, Any]:
    """Run both trainings and return the certificate. Raises NotEqual with what differs, Stuck when nothing moves."""
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
            rounds.append(one_round(broken, done))
            shutil.rmtree(folder)
        return certify(
            spec,
            whole=whole,
            rounds=rounds,
            seed=seed,
            processes=processes,
            shards=shards,
            elastic=elastic,
            seconds=time.time() - began,
        )
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


def read_result(spec_file: Path) -> TrainResult:
    """The result of the training of that spec."""
    return TrainResult.read(Path(json.loads(spec_file.read_text())["output"]) / "result.json")


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
    except (NotEqual, Stuck) as error:
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
