"""`reprise runs`, `show`, `logs`, `cancel`: what was done, read from the store; nothing is started.

Not covered: running (flows.execute), what would run (flows.plan).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError, StepError
from deployments.workload import INTERRUPTIONS
from flows import cluster_runs
from flows.display import SIGNS, ago, say, seconds, show_json, table
from flows.execute import summary
from flows.run import read_run, run_ids
from flows.start import Order, where
from tasks.records import Store


def list_runs(order: Order, *, as_json: bool) -> None:
    """All runs of this project, newest last."""
    documents = _documents(order)
    if as_json:
        show_json(documents)
        return
    if not documents:
        say("no runs yet: reprise run")
        return
    rows = [
        [
            d["run"],
            d["status"],
            d["git_sha"][:7],
            d["data_digest"][:7],
            d["cause"],
            ago(d["started"]),
            seconds((d["ended"] or time.time()) - d["started"]),
            f"{sum(s['reused'] for s in d['steps'])}/{len(d['steps'])}",
            str(sum(a["cause"] in INTERRUPTIONS for a in d["attempts"])),
            str(d["model_version"] or ""),
        ]
        for d in documents
    ]
    table(["run", "status", "commit", "data", "cause", "started", "took", "reused", "interruptions", "version"], rows)


def show_run(order: Order, run: str, *, as_json: bool) -> None:
    """One run: steps, attempts, results, links."""
    document = find_run(order, run)
    if as_json:
        show_json(document)
        return
    say(
        f"{document['run']}  {document['status']}" + (f": {document['message']}" if document["message"] else ""),
        style="bold",
    )
    steps = [
        [SIGNS.get(s["status"], " "), s["name"], s["status"], seconds(s["seconds"] or None), s["key"][:12], s["reason"]]
        for s in document["steps"]
    ]
    table(["", "step", "status", "took", "key", "why"], steps)
    if document["attempts"]:
        rows = [
            [
                str(a["number"]),
                a["cause"] or "running",
                f"{a['from_step']}-{a['reached_step']}",
                str(a["steps_lost"]),
                "" if a["notice_to_saved"] is None else f"{a['notice_to_saved']:.2f} s",
                seconds(a["idle_seconds"]),
                seconds((a["ended"] or time.time()) - a["started"]),
                " ".join(filter(None, (a.get("capacity"), a.get("node")))),
                "; ".join(filter(None, (a["reason"], a.get("asked") and f"asked for {a['capacity']}: {a['asked']}"))),
            ]
            for a in document["attempts"]
        ]
        table(["attempt", "cause", "steps", "lost", "notice to saved", "idle", "took", "where", "reason"], rows)
    for name, value in summary(document):
        say(f"{name:<10} {value}")


def show_logs(order: Order, run: str, *, step: str, follow: bool) -> None:
    """The log of each step of a run, in order; of one step if it is named."""
    document = find_run(order, run)
    names = [s["name"] for s in document["steps"]] + ["write_report"]
    if step and step not in names:
        raise ConfigError(f"--step {step}: no step of {document['run']}; expected one of: {', '.join(names)}")
    found = False
    for name in [step] if step else names:
        for title, lines in _logs(order, document, name, follow=follow):
            found = True
            say(f"--- {title}", style="bold")
            for line in lines:
                print(line, flush=True)
    if not found:
        say(f"no log of {step or document['run']} here: a reused step has its log in the run that did the work")


def find_run(order: Order, run: str) -> dict[str, Any]:
    """The document of a run (empty: the newest), wherever it ran. Raises ConfigError for an unknown one."""
    if cluster_runs.on_cluster(order):
        return cluster_runs.document(order, run)
    _, _, store = where(order)
    return read_run(store, run or newest(store))


def _documents(order: Order) -> list[dict[str, Any]]:
    if cluster_runs.on_cluster(order):
        return cluster_runs.documents(order)
    _, _, store = where(order)
    found = [read_run(store, run) for run in run_ids(store) if store.read(f"runs/{run}") is not None]
    return sorted(found, key=lambda d: float(d["started"]))


def _logs(order: Order, document: dict[str, Any], step: str, *, follow: bool) -> Iterator[tuple[str, Iterator[str]]]:
    if cluster_runs.on_cluster(order):
        return cluster_runs.step_logs(order, document, step, follow=follow)
    _, place, _ = where(order)
    return _step_logs(place.state / "jobs", document, step, follow=follow)


def _step_logs(jobs: Path, document: dict[str, Any], step: str, *, follow: bool) -> Iterator[tuple[str, Iterator[str]]]:
    from deployments.laptop import Laptop

    keys = {s["name"]: s["key"][:12] for s in document["steps"]}
    pattern = {
        "train_model": f"train-{keys['train_model']}-*",
        "write_report": f"write-report-{document['run']}-*",
    }.get(step, f"{step.replace('_', '-')}-{keys.get(step, '')}-{document['run'].rpartition('-')[2]}")
    folders = sorted(jobs.glob(pattern), key=lambda f: f.stat().st_mtime)
    for folder in folders:
        yield f"{step} ({folder.name})", Laptop(jobs).logs(folder.name, follow=follow)


def cancel_run(order: Order, run: str, *, wait_seconds: float = 120.0) -> dict[str, Any]:
    """Stop a run: its step gets notice, its checkpoint stands. A run whose process died loses what it left running."""
    if cluster_runs.on_cluster(order):
        return cluster_runs.cancel(order, run)
    _, place, store = where(order)
    run = run or newest(store)
    document = read_run(store, run)
    if document["status"] in ("running", "waiting") and cancelled_in_prefect(document, place.ports.prefect):
        give_up = time.monotonic() + wait_seconds
        while store.held(f"run-{run}") and time.monotonic() < give_up:
            time.sleep(0.1)
        if document["status"] == "waiting":
            store.write(f"runs/{run}", {**document, "status": "cancelled", "message": "cancelled"})
    elif document["status"] == "running":
        os.kill(int(document["process"]), signal.SIGINT)
        give_up = time.monotonic() + wait_seconds
        while store.held(f"run-{run}") and time.monotonic() < give_up:
            time.sleep(0.1)
    else:
        from deployments.laptop import Laptop

        runner = Laptop(place.state / "jobs")
        keys = {s["key"][:12] for s in document["steps"]}
        for folder in (place.state / "jobs").glob("*"):
            if any(key in folder.name for key in keys):
                runner.stop(folder.name)
        if document["status"] == "interrupted":
            store.write(
                f"runs/{run}", {**document, "status": "cancelled", "ended": time.time(), "message": "cancelled"}
            )
    return read_run(store, run)


def cancelled_in_prefect(document: dict[str, Any], port: int) -> bool:
    """Cancel a run that Prefect started in Prefect, else it would be resumed; False for one of the command."""
    from flows.prefect_api import Prefect

    prefect, flow_run = Prefect(url=f"http://127.0.0.1:{port}"), document["links"].get("prefect_flow_run", "")
    try:
        found = prefect.run(flow_run) if flow_run else None
        if not found or not found.get("deployment_id"):
            return False
        waits = document["status"] == "waiting"  # nobody has to be told to end
        kind, name = ("CANCELLED", "Cancelled") if waits else ("CANCELLING", "Cancelling")
        return prefect.set_state(flow_run, kind, name, "Cancelled by `reprise cancel`.")
    except StepError:
        return False


def newest(store: Store) -> str:
    """The run that was started last. Raises ConfigError when there is none."""
    ids = [run for run in run_ids(store) if store.read(f"runs/{run}") is not None]
    if not ids:
        raise ConfigError(f"there is no run in {store.path} yet: reprise run")
    return max(ids, key=lambda run: float((store.read(f"runs/{run}") or {}).get("started", 0)))
