"""The commands that look at a cluster: preflight, render, gpu, and what doctor is there. None changes anything.

    reprise preflight --save cluster.json        # where the cluster is reachable
    reprise preflight --snapshot cluster.json    # anywhere

Not covered: running on a cluster (flows.submit), parsing the command line (flows.__main__).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError
from flows.cluster_settings import load_cluster
from flows.place_settings import kind_of, load_place, read_place
from flows.run import run_ids
from flows.start import Order, at_revision, pipeline_file
from tasks.records import Store


def show_cluster_preflight(order: Order, *, snapshot: str = "", save: str = "", as_json: bool) -> None:
    """`reprise preflight`: what a run of this pipeline needs against what the cluster has. PreflightError for a FAIL.

    `snapshot`: a file to judge in place of a live cluster; `save`: where to keep what was seen.
    """
    from flows.preflight import dvc_probe, look, planned_workloads, show_preflight

    file = pipeline_file(order)
    cluster = load_cluster(order.place, file.parent)
    project, pipeline, sha = at_revision(order, file)
    workloads = planned_workloads(
        pipeline=pipeline.name,
        workers=pipeline.train.workers,
        resources=cluster.resources.by_step(),
        nodes=cluster.resources.train_model.nodes,
        spot=cluster.spot.train,
        start_seconds=cluster.spot.policy().start_seconds if cluster.spot.fallback and cluster.spot.train else None,
        grace_seconds=cluster.spot.grace,
    )
    data = project.in_repo(pipeline.data.path)
    findings = look(
        cluster.cluster_place(),
        workloads,
        snapshot=Path(snapshot) if snapshot else None,
        save=Path(save) if save else None,
        kubeconfig=cluster.place.kubeconfig,
        context=cluster.place.context,
        dvc=None if snapshot else dvc_probe(lambda: project.data_pointer(sha, data)),
        save_seconds=None if snapshot else _save_seconds(order, pipeline.name),
    )
    show_preflight(findings, as_json=as_json)


def examine_place(order: Order, *, snapshot: str = "", as_json: bool) -> None:
    """`reprise doctor`: of this machine, or with a cluster's place its preflight."""
    if _kind(order) == "cluster":
        show_cluster_preflight(order, snapshot=snapshot, as_json=as_json)
        return
    if snapshot:
        raise ConfigError(f"--snapshot {snapshot}: a laptop has none; expected --place cluster with it")
    from flows.commands import show_findings

    show_findings(order, as_json=as_json)


def show_render(order: Order, *, step: str = "", server: bool = False, as_json: bool = False) -> None:
    """`reprise render`; with `server` the API server's word on every object, PreflightError if it refuses one."""
    from flows.render import objects_of_run, render_run, rendering

    file = pipeline_file(order)
    cluster = load_cluster(order.place, file.parent)
    project, pipeline, sha = at_revision(order, file)
    asked = rendering(pipeline, cluster, project, sha)
    if not server:
        if as_json:
            raise ConfigError("--json: expected --server with it; without it the objects are YAML")
        print(render_run(asked, step), end="")
        return
    from deployments.dry_run import dry_run
    from deployments.kube_connect import connect
    from flows.preflight import show_preflight

    objects = objects_of_run(asked, step)
    api = connect(kubeconfig=cluster.place.kubeconfig, context=cluster.place.context)
    try:
        show_preflight(list(dry_run(api, objects)), as_json=as_json, what="objects")
    finally:
        api.close()


def show_gpu_use(order: Order, *, prometheus: str = "", minutes: float = 60.0, as_json: bool) -> None:
    """`reprise gpu`: use by run. Raises ConfigError without a Prometheus, Unreachable if it does not answer."""
    from flows.gpu_use import Prometheus, gpu_uses, runs_of_keys, runs_of_pods, show_gpu
    from tasks.attempts import progress_of
    from training.verdict import sentence_of

    url = prometheus or os.environ.get("PROMETHEUS_URL", "")
    if not url:
        raise ConfigError(
            "no Prometheus given; expected --prometheus http://HOST:PORT or PROMETHEUS_URL in the environment; "
            "from outside the cluster: kubectl -n monitoring port-forward svc/NAME 9090"
        )
    if not minutes > 0:
        raise ConfigError(f"--minutes {minutes:g}: expected a number above zero, such as 60")
    server = Prometheus(url=url)
    store, since = _store(order), time.time() - minutes * 60
    if store is None:  # outside the cluster: the metrics themselves say which run a training belongs to
        keys = runs_of_keys(server, minutes=minutes)
        show_gpu(gpu_uses(server, keys=keys, timelines=None, minutes=minutes), as_json=as_json, minutes=minutes)
        return
    read = (store.read(f"runs/{run}") for run in run_ids(store))
    documents: list[dict[str, Any]] = [d for d in read if d is not None and (d.get("ended") or since) >= since]
    timelines, verdicts = {}, {}
    for document in documents:
        key = next((s["key"] for s in document["steps"] if s["name"] == "train_model"), "")
        training = store.path / "trainings" / key
        timelines[str(document["run"])] = progress_of(str(training / "progress.jsonl"))
        verdicts[str(document["run"])] = sentence_of(training / "output")
    uses = gpu_uses(server, pods=runs_of_pods(documents), timelines=timelines, verdicts=verdicts, minutes=minutes)
    show_gpu(uses, as_json=as_json, minutes=minutes)


def _save_seconds(order: Order, pipeline: str) -> float | None:
    """How long the slowest save of the pipeline's last training took; None if none is known here."""
    from tasks.attempts import progress_of

    store = _store(order)
    last = store.read(f"pipelines/{pipeline}") if store is not None else None
    if store is None or not last or not last.get("train_model"):
        return None
    lines = progress_of(str(store.path / "trainings" / last["train_model"] / "progress.jsonl"))
    return max((float(line["durable"]) for line in lines if "durable" in line), default=None)


def _kind(order: Order) -> str:
    """The kind of the order's place; "" if it cannot be told, which the command itself then explains."""
    try:
        folder = pipeline_file(order).parent
    except ConfigError:
        folder = Path.cwd()  # doctor also works where there is no project yet
    try:
        return kind_of(read_place(order.place, folder)[1])
    except ConfigError:
        return ""


def _store(order: Order) -> Store | None:
    """The records of a place's runs; None where the state volume of a cluster is not mounted."""
    folder = pipeline_file(order).parent
    if kind_of(read_place(order.place, folder)[1]) != "cluster":
        return Store(root=str(load_place(order.place, folder).state / "store"))
    root = Path(load_cluster(order.place, folder).state.mount)
    return Store(root=str(root / "store")) if root.is_dir() else None
