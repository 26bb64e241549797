"""A cluster's runs from somebody's machine: `reprise runs`, `show`, `logs`, `cancel` with --place cluster.

Documents come through Prefect (flows.run_mirror); their records are on the state volume, which is not mounted here.
Logs come from the pods, so they need a kubeconfig. Not covered: starting and following runs (flows.submit).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from deployments.errors import ConfigError, GiveUp
from flows.cluster_settings import ClusterSettings, load_cluster
from flows.execute import Interrupted
from flows.follow import ENDS, Follower
from flows.place import is_cluster
from flows.prefect_api import Prefect
from flows.run_mirror import KIND
from flows.settings import load_pipeline
from flows.start import Order, pipeline_file
from flows.submit import prefect_url

LIMIT = 200  # artifacts, newest first
LIVE = ("running", "waiting")


def on_cluster(order: Order) -> bool:
    """Whether an order is about a cluster. Raises ConfigError."""
    return is_cluster(order.place, pipeline_file(order).parent)


def documents(order: Order) -> list[dict[str, Any]]:
    """The runs of the order's pipeline, oldest first; of one that came through several flow runs the last word."""
    file = pipeline_file(order)
    prefect, name = _prefect(load_cluster(order.place, file.parent)), load_pipeline(file).name
    body = {"artifacts": {"type": {"any_": [KIND]}}, "sort": "UPDATED_DESC", "limit": LIMIT}
    found: dict[str, dict[str, Any]] = {}
    for artifact in prefect.call("POST", "/artifacts/filter", body):
        data = artifact["data"]
        document = (json.loads(data) if isinstance(data, str) else data)["document"]
        if document["pipeline"] == name:
            found.setdefault(document["run"], document)
    return sorted(found.values(), key=lambda d: float(d["started"]))


def document(order: Order, run: str) -> dict[str, Any]:
    """One run's (empty: the newest), its status corrected if its flow is gone. Raises ConfigError if there is none."""
    known = documents(order)
    if not known:
        raise ConfigError(f"Prefect knows of no run of this pipeline yet: reprise run --place {order.place}")
    found = next((d for d in known if d["run"] == run), None) if run else known[-1]
    if found is None:
        raise ConfigError(f"run {run!r} is not known; the last runs are: {', '.join(d['run'] for d in known[-5:])}")
    if found["status"] in LIVE:
        settings = load_cluster(order.place, pipeline_file(order).parent)
        state = ((_prefect(settings).run(found["links"].get("prefect_flow_run", "none")) or {}).get("state")) or {}
        if state.get("type") in ENDS:
            found["status"] = "cancelled" if state["type"] == "CANCELLED" else "interrupted"
            found["message"] = f"its flow run is {state['name']}: {state.get('message') or ''}".rstrip(": ")
    return found


def cancel(order: Order, run: str) -> dict[str, Any]:
    """Cancel a run in Prefect and wait for its flow to end. Raises GiveUp for one that has ended."""
    found = document(order, run)
    settings = load_cluster(order.place, pipeline_file(order).parent)
    prefect, flow_run = _prefect(settings), found["links"].get("prefect_flow_run", "")
    if found["status"] not in LIVE or not flow_run:
        raise GiveUp(f"{found['run']} is {found['status']}: nothing to cancel")
    waits = found["status"] == "waiting"  # nobody has to be told to end
    kind, name = ("CANCELLED", "Cancelled") if waits else ("CANCELLING", "Cancelling")
    prefect.set_state(flow_run, kind, name, "Cancelled by `reprise cancel`.")
    watching = Follower(prefect=prefect, flow_run=flow_run, settings=settings, quiet=True, cancelled=True)
    with contextlib.suppress(Interrupted):
        watching.follow()
    return document(order, found["run"])


def step_logs(order: Order, found: dict[str, Any], step: str, *, follow: bool) -> Iterator[tuple[str, Iterator[str]]]:
    """(title, lines) of the pods of one step that are still there."""
    from deployments.cluster import Cluster

    settings = load_cluster(order.place, pipeline_file(order).parent)
    access = settings.place
    runner = Cluster(settings.cluster_place(), kubeconfig=access.kubeconfig, context=access.context)
    for name in _workloads(found, step):
        if runner.pods_of(name):
            yield f"{step} ({name})", runner.logs(name, follow=follow)


def _workloads(found: dict[str, Any], step: str) -> list[str]:
    """Names of what ran for a step, as flows.program and tasks.train_model give them."""
    run = str(found["run"])
    if step == "write_report":
        return [f"write-report-{run}-{which}" for which in (*range(found.get("resumed", 0) + 1), "done")]
    key = next(str(s["key"])[:12] for s in found["steps"] if s["name"] == step)
    if step == "train_model":
        return [f"train-{key}-{attempt['number']}" for attempt in found["attempts"]]
    return [f"{step.replace('_', '-')}-{key}-{run.rpartition('-')[2]}"]


def _prefect(settings: ClusterSettings) -> Prefect:
    return Prefect(url=prefect_url(settings))
