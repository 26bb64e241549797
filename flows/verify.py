"""`reprise verify-resume`: the proof that interruptions change nothing, for the training of this commit.

    reprise verify-resume --kills 10 --seed 1

Trains uninterrupted and again through random kills (training.verify_resume) with the pipeline's own data, code and
settings, and leaves the certificate where register_model finds it; a version that is registered already gets its digest
as a tag. Not covered: the gate that asks for it ([gate] require_resume_certificate, tasks.gate).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deployments.errors import GiveUp
from deployments.workload import Workload
from flows import requests
from flows.program import run_program, step_workload
from flows.run import Run
from flows.start import Order, make_runner, prepare
from flows.watch import Watch
from tasks.pull_data import PulledData
from training.tracking import TrackingRefused, TrackingUnavailable, set_version_tag


def verify_resume(order: Order, *, kills: int, seed: int, quiet: bool) -> dict[str, Any]:
    """Run the proof and return the certificate. Raises GiveUp when a resumed training came out different."""
    prepared = prepare(order)
    plan = prepared.plan()
    watch = Watch(quiet=quiet)
    run = Run(
        id=f"{plan.pipeline.name}-0", plan=plan, store=prepared.store, runner=make_runner(prepared),
        urls=prepared.urls, document={}, on_event=watch,
    )  # fmt: skip
    try:
        data = _data(run)
        certificate = _prove(run, data, kills=kills, seed=seed)
    finally:
        watch.close()
    _tag_version(run, certificate)
    return certificate


def _data(run: Run) -> PulledData:
    pulled = run.plan.steps["pull_data"].record
    if pulled and Path(pulled.result["folder"]).is_dir():
        return PulledData(**pulled.result)
    return PulledData(**run_program(run, step_workload(run, "pull_data", requests.pull(run)), "pull_data")["result"])


def _prove(run: Run, data: PulledData, *, kills: int, seed: int) -> dict[str, Any]:
    spec, path = requests.train_spec(run, data), requests.certificate_path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{seed}-{kills}.json")
    aside.unlink(missing_ok=True)
    workload = Workload(
        name=f"verify-{spec.key[:12]}-{seed}-{kills}",
        image="train",
        command=(
            "python", "-m", "training.verify_resume", "--spec", "{request}", "--kills", str(kills), "--seed", str(seed),
            "--processes", str(run.plan.pipeline.train.workers), "--output", str(aside),
        ),
        request=asdict(spec),
        labels={"pipeline": spec.pipeline, "step": "verify_resume"},
    )  # fmt: skip
    outcome = run.runner.run(workload, on_line=lambda line: run.event("line", step="verify_resume", line=line))
    if not aside.exists():
        raise GiveUp(f"verify-resume: {outcome.reason}; its log is {outcome.log}")
    certificate: dict[str, Any] = json.loads(aside.read_text())
    if not certificate["equal"]:
        raise GiveUp(f"verify-resume: a resumed training came out different; the hashes are in {aside}")
    aside.replace(path)
    return {**certificate, "file": str(path)}


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _tag_version(run: Run, certificate: dict[str, Any]) -> None:
    """Best effort: the file is what the gate reads."""
    registered = run.store.step(run.plan.steps["register_model"].key)
    if registered is None:
        return
    version = registered.result["version"]
    tag = "reprise.resume_certificate"
    try:
        set_version_tag(run.urls["mlflow"], run.plan.pipeline.name, version, tag, _sha256(certificate["file"]))
    except (TrackingUnavailable, TrackingRefused):
        run.event("line", step="verify_resume", line=f"version {version} is not tagged: MLflow is away")
