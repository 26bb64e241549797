"""What each model version was made of, and the champion's numbers on the held-out data of this run.

The gate compares candidate and champion on the same held-out data. When that data has not changed the champion's own
numbers stand; otherwise it is evaluated again, on the train image, because the registering step carries no torch.
Not covered: the decision (tasks.gate), moving the champion (tasks.deploy_model).
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deployments.errors import GiveUp
from deployments.workload import Workload
from flows import requests
from flows.run import Run
from tasks.pull_data import PulledData
from tasks.register_model import RegisteredModel
from tasks.train_model import TrainedModel


def remember_version(run: Run, data: PulledData, training: TrainedModel, model: RegisteredModel) -> None:
    """Keep what is needed to evaluate, package and serve this version again. The first writer's word stands."""
    name = f"versions/{run.plan.pipeline.name}-{model.version}"
    if run.store.read(name) is None:
        run.store.write(
            name,
            {
                "version": model.version,
                "run": run.id,
                "git_sha": run.plan.git_sha,
                "data_digest": run.plan.data.digest,
                "heldout_digest": data.heldout_digest,
                "spec": asdict(requests.train(run, data).spec),
                "training": asdict(training),
                "serve": requests.serve_settings(run),
            },
        )
    run.update(model_version=model.version, metrics=training.metrics)


def version_record(run: Run, version: str) -> dict[str, Any] | None:
    """What `remember_version` kept."""
    record: dict[str, Any] | None = run.store.read(f"versions/{run.plan.pipeline.name}-{version}")
    return record


async def champion_on(run: Run, data: PulledData) -> dict[str, Any] | None:
    """{"version", "metrics", "heldout_digest"} of the version in service on this run's held-out data, or None."""
    if run.plan.steps["register_model"].reused:
        return None  # the decision stands; nothing is compared
    endpoint = run.store.read(f"endpoints/{run.plan.pipeline.name}")
    serving = (endpoint or {}).get("serving")
    known = version_record(run, serving["version"]) if serving else None
    if known is None:
        return None
    metrics = known["training"]["metrics"]
    if known["heldout_digest"] != data.heldout_digest:
        metrics = await asyncio.to_thread(_evaluate, run, known, data)
    champion = {"version": known["version"], "metrics": metrics, "heldout_digest": data.heldout_digest}
    run.results["champion"] = champion
    return champion


def _evaluate(run: Run, known: dict[str, Any], data: PulledData) -> dict[str, float]:
    """The champion's weights and code on the new held-out data."""
    name = f"evaluate-{known['spec']['key'][:12]}-{data.heldout_digest[:12]}"
    output = run.store.path / "evaluations" / name
    spec = {**known["spec"], "data": data.folder, "output": str(output), "mlflow_uri": "", "progress": ""}
    run.event(
        "line",
        step="register_model",
        line=f"evaluating the champion, version {known['version']}, on the new held-out data",
    )
    workload = Workload(
        name=name,
        image="train",
        command=("python", "-m", "training.evaluate", "--spec", "{request}", "--weights", known["training"]["weights"]),
        request=spec,
        labels={"run": run.id, "pipeline": run.plan.pipeline.name, "step": "register_model"},
    )
    outcome = run.runner.run(workload)
    try:
        metrics: dict[str, float] = json.loads((Path(output) / "metrics.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise GiveUp(
            f"champion {known['version']}: evaluation on the new held-out data failed: {outcome.reason}; "
            f"its log is {outcome.log}"
        ) from error
    return metrics
