"""`reprise preflight` and `reprise doctor --place cluster`: would a run work there, row by row, before it is started.

    show_preflight(place, planned_workloads(...), snapshot=None, save=None, as_json=False)

A live cluster is looked at, or a snapshot that somebody took (`--snapshot FILE`, written by `--save FILE`). One FAIL
ends with exit code 3. Not covered: the judgement (deployments.preflight), reading cluster.toml
(flows.cluster_settings).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deployments.cluster_place import ClusterPlace
from deployments.errors import PreflightError, StepError
from deployments.preflight import failures, preflight
from deployments.preflight_findings import Finding
from deployments.snapshot import Snapshot
from deployments.snapshot_take import take
from deployments.workload import Resources, Workload
from flows.display import say, show_json, table

STEPS = ("pull_data", "register_model", "package_model", "deploy_model", "check_endpoint", "write_report")
SHOWN = 6  # names in the last line
ORDER = {"FAIL": 0, "WARN": 1, "OK": 2}


def planned_workloads(
    *,
    pipeline: str,
    workers: int,
    resources: Mapping[str, Resources],
    nodes: int = 1,
    spot: bool = True,
    start_seconds: float | None = None,
    grace_seconds: float = 30.0,
) -> list[Workload]:
    """What a run of the pipeline would create, as far as a cluster is concerned: the training first, then the steps.

    `workers`: processes over all nodes. `start_seconds`: until the other capacity is asked for; None: it never is.
    `resources`: by step; a step without an entry asks for the default.
    """
    training = Workload(
        name="train-preflight",
        image="train",
        command=("python", "-m", "training.launch", "--spec", "{request}", "--processes", str(workers // nodes)),
        resources=resources.get("train_model", Resources()),
        replicas=nodes,
        processes=workers // nodes,
        spot=spot,
        start_seconds=start_seconds,
        grace_seconds=grace_seconds,
        labels={"pipeline": pipeline, "step": "train_model"},
    )
    steps = [
        Workload(
            name=f"{step.replace('_', '-')}-preflight",
            image="step",
            command=("python", "-m", "tasks.step", step, "{request}", "{result}"),
            resources=resources.get(step, Resources()),
            account="deploy" if step == "deploy_model" else "",
            labels={"pipeline": pipeline, "step": step},
        )
        for step in STEPS
    ]
    return [training, *steps]


def look(
    place: ClusterPlace,
    workloads: Sequence[Workload],
    *,
    snapshot: Path | None = None,
    save: Path | None = None,
    kubeconfig: str = "",
    context: str = "",
    dvc: Mapping[str, Any] | None = None,
    save_seconds: float | None = None,
) -> list[Finding]:
    """The rows, worst first. `dvc`: {"remote", "verify"} or {"remote", "error"} of the data's remote.

    Raises ConfigError for a snapshot or kubeconfig that cannot be read, Unreachable for an API that does not answer.
    """
    seen = Snapshot.read(snapshot) if snapshot is not None else _live(place, kubeconfig, context, dvc)
    if save is not None:
        seen.save(save)
    findings = preflight(seen, workloads, place, save_seconds=save_seconds)
    return sorted(findings, key=lambda f: ORDER[f.verdict])


def _live(place: ClusterPlace, kubeconfig: str, context: str, dvc: Mapping[str, Any] | None) -> Snapshot:
    import os

    from deployments.kube_connect import connect
    from deployments.probes import probe_mlflow

    probes: dict[str, dict[str, Any]] = {}
    inside = "KUBERNETES_SERVICE_HOST" in os.environ  # Service names mean something there only
    if inside and (url := place.env.get("MLFLOW_TRACKING_URI")):
        probes["mlflow"] = probe_mlflow(url)
    if dvc is not None:
        probes["dvc"] = dict(dvc)
    api = connect(kubeconfig=kubeconfig, context=context)
    try:
        return take(api, place, probes=probes)
    finally:
        api.close()


def dvc_probe(ask: Any) -> dict[str, Any]:
    """What asking for the data's pointer says of its remote. `ask`: a call that raises StepError if it is not well."""
    try:
        ask()
    except StepError as error:
        return {"remote": "the data's remote", "error": str(error).splitlines()[0]}
    return {"remote": "the data's remote", "verify": True}


def show_preflight(findings: Sequence[Finding], *, as_json: bool, what: str = "checks") -> None:
    """A table, or JSON; then PreflightError (exit code 3) if there is a FAIL. `what`: what a row is about."""
    if as_json:
        show_json([asdict(f) for f in findings])
    else:
        table(["what", "", "found", "fix"], [[f.what, f.verdict, f.found, f.fix] for f in findings])
        warned = sum(f.verdict == "WARN" for f in findings)
        if warned and not failures(findings):
            say(f"it would run; {warned} {'thing' if warned == 1 else 'things'} to know")
    if failed := failures(findings):
        names = list(dict.fromkeys(f.what for f in failed))
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise PreflightError(f"{len(failed)} of {len(findings)} {what} failed: {', '.join(names[:SHOWN])}{more}")
