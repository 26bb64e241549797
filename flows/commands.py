"""What the commands do that is not their own module: run, demo, plan, up, down, resume, cancel, rollback, doctor.

Each ends with the commands one would type next. Not covered: parsing the command line (flows.__main__).
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError, PreflightError
from flows.display import next_commands, say, seconds, show_json, table
from flows.execute import execute, resumed, summary
from flows.laptop_only import laptop_only
from flows.place import is_cluster
from flows.run import FINISHED
from flows.start import Order, pipeline_file, there, where


def run_pipeline(order: Order, *, as_json: bool, detach: bool = False) -> None:
    """`reprise run`"""
    began = time.perf_counter()
    if is_cluster(order.place, pipeline_file(order).parent):
        _run_on_cluster(order, as_json=as_json, detach=detach)
        return
    if detach:
        raise ConfigError("--detach: a laptop's run is this process; expected it with --place cluster only")
    document = execute(order, quiet=as_json)
    _finish(document, as_json=as_json, took=time.perf_counter() - began)
    if not as_json:
        next_commands(f"reprise show {document['run']}", f"reprise logs {document['run']}")


def _run_on_cluster(order: Order, *, as_json: bool, detach: bool) -> None:
    from flows.submit import submit

    began = time.perf_counter()
    document = submit(order, detach=detach, quiet=as_json)
    if not detach:
        _finish(document, as_json=as_json, took=time.perf_counter() - began)
        if not as_json:
            run = f"{document['run']}{there(order)}"
            next_commands(f"reprise show {run}", f"reprise logs {run}")
    elif as_json:
        show_json(document)


def run_demo(*, folder: str, example: str, as_json: bool) -> None:
    """`reprise demo`"""
    from flows.demo import curl_line, demo

    began = time.perf_counter()
    document = demo(folder=folder, example=example, quiet=as_json)
    _finish(document, as_json=as_json, took=time.perf_counter() - began)
    if as_json:
        return
    project = Path(folder).absolute()
    train_key = next(s["key"] for s in document["steps"] if s["name"] == "train_model")
    heldout = project / ".reprise" / "store" / "trainings" / train_key / "output" / "heldout.jsonl"
    say()
    say("Ask it:", style="bold")
    say(f"  {curl_line(project, document, heldout)}")
    next_commands(
        "reprise run                 # again: every step is reused",
        f"reprise show {document['run']}",
        "reprise down                # stop the services",
    )


def _finish(document: dict[str, Any], *, as_json: bool, took: float) -> None:
    if as_json:
        show_json(document)
        return
    say()
    for name, value in summary(document):
        say(f"{name:<10} {value}")
    say(f"{'took':<10} {seconds(took)}", style="dim")


def resume_run(order: Order, run: str, *, as_json: bool) -> None:
    """`reprise resume`"""
    from flows.inspect_runs import find_run

    document = find_run(order, run)
    run = str(document["run"])
    if document["status"] in FINISHED:
        say(f"run {run} is {document['status']}: nothing to resume")
        return
    again = resumed(order, document, run)
    if is_cluster(order.place, pipeline_file(order).parent):
        again = replace(again, pipeline=order.pipeline)  # the document's is the pod's
    run_pipeline(again, as_json=as_json)


def cancel_and_tell(order: Order, run: str) -> None:
    """`reprise cancel`"""
    from flows.inspect_runs import cancel_run

    document = cancel_run(order, run)
    say(f"run {document['run']} is {document['status']}" + (f": {document['message']}" if document["message"] else ""))
    if document["status"] not in FINISHED:
        next_commands(f"reprise resume {document['run']}")


def show_plan(order: Order, *, as_json: bool) -> None:
    """`reprise plan`"""
    from flows.ask import ask, plan_question

    plan = ask(order, plan_question(order), quiet=as_json)
    if as_json:
        show_json(plan)
        return
    say(f"{plan['pipeline']} at {plan['git_sha'][:12]}, data {plan['data_digest'][:12]} ({plan['data_files']} files)")
    rows = [[s["name"], "reused" if s["reused"] else "runs", s["reason"], s["key"][:12]] for s in plan["steps"]]
    table(["step", "", "why", "key"], rows)
    next_commands("reprise run" + (f" --rev {order.rev}" if order.rev != "HEAD" else "") + there(order))


def start_services(*, pipeline: str, place: str) -> None:
    """`reprise up`"""
    from flows.services import ensure_services, restore_endpoints
    from flows.trigger_commands import ensure_serving

    order = Order(pipeline=pipeline, place=place)
    laptop_only(order, "up")
    file, settings, store = where(order)
    urls = ensure_services(settings)
    restored = restore_endpoints(settings, store)
    serving = ensure_serving(file, settings)
    for name, text in (("prefect", "Prefect"), ("mlflow", "MLflow"), ("inference", "TorchServe")):
        say(f"{text:<12} {urls[name]}")
    for line in restored:
        say(line)
    registering = () if serving else ("reprise deploy              # schedule, form, pushes",)
    next_commands("reprise run", *registering, "reprise down")


def stop_services(*, pipeline: str, place: str) -> None:
    """`reprise down`"""
    from deployments.laptop import Laptop
    from deployments.services import down
    from flows.trigger_commands import stop_serving

    order = Order(pipeline=pipeline, place=place)
    laptop_only(order, "down")
    _, settings, _ = where(order)
    runner = Laptop(settings.state / "jobs")
    served = stop_serving(settings)  # first: its flows tell their trainers to save
    for folder in sorted((settings.state / "jobs").glob("*")):
        runner.stop(folder.name, grace_seconds=settings.spot.grace)
    left = runner.reap()
    stopped = [*served, *down(settings.state)]
    for line in [*left, *(f"stopped {name}" for name in stopped)]:
        say(line)
    if not stopped and not left:
        say("nothing was running")


def roll_back(order: Order, to: str, *, as_json: bool) -> None:
    """`reprise rollback`"""
    from flows.rollback import rollback

    document = rollback(order, to)
    if as_json:
        show_json(document)
        return
    say(f"{document['pipeline']}: version {document['version']} is in service again (was {document['previous']})")
    say(document["url"])
    next_commands(f"reprise runs{there(order)}", f"reprise run{there(order)}")


def show_findings(order: Order, *, as_json: bool) -> None:
    """`reprise doctor`"""
    from flows.doctor import examine

    findings = examine(order)
    if as_json:
        show_json([vars(f) for f in findings])
    else:
        table(["what", "", "found", "fix"], [[f.what, f.verdict, f.found, f.fix] for f in findings])
    failed = [f.what for f in findings if f.verdict == "FAIL"]
    if failed:
        raise PreflightError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")
