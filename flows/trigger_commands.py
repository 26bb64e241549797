"""`reprise deploy`, `reprise hook ...`, and the worker that `up` starts and `down` ends.

Not covered: what they do (flows.triggers, flows.push_receiver, flows.push_handover, flows.serve), and parsing
(flows.__main__).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cluster_settings import ClusterSettings
from flows.display import ago, next_commands, say, show_json, table
from flows.settings import PlaceSettings, load_pipeline
from flows.start import Order, pipeline_file

if TYPE_CHECKING:
    from flows.push_queue import Entry

WORKER_STOP_SECONDS = 28.0  # a trainer that saves first needs its grace


def deploy_pipeline(*, pipeline: str, place: str, render_only: bool, as_json: bool) -> None:
    """`reprise deploy`"""
    from flows.triggers import any_place, pool_name, prefect_of, register, render

    file = pipeline_file(Order(pipeline=pipeline))
    settings, loaded = any_place(place, file.parent), load_pipeline(file)
    if render_only:
        print(render(loaded, settings), end="")
        return
    deployment = register(loaded, settings)
    if not isinstance(settings, ClusterSettings):
        ensure_serving(file, settings)  # it runs now: the pipeline is registered
    url = f"{prefect_of(settings).url}/deployments/deployment/{deployment}"
    schedule = loaded.schedule
    timed = f"{schedule.cron} {schedule.timezone}{' (paused)' if schedule.paused else ''}" if schedule.cron else "none"
    if as_json:
        show_json({"deployment": deployment, "url": url, "schedule": timed, "work_pool": pool_name(settings)})
        return
    say(f"retrain/{loaded.name} is registered: {url}")
    say(f"schedule    {timed}")
    say(f"overlap     {schedule.overlap}: one run of a pipeline at a time")
    say(f"form        {url}?tab=Details, button Run")
    next_commands("reprise hook serve           # retrain on git push", "reprise runs")


def ensure_serving(file: Path, place: PlaceSettings) -> bool:
    """Install the watch over heartbeats, and start the worker if the pipeline is registered; whether it runs.

    The watch also where stock `prefect deploy` has registered it. Raises TryAgain without a server.
    """
    from flows.serve import ensure_worker
    from flows.triggers import install_automation, prefect_of

    prefect = prefect_of(place)
    install_automation(prefect)
    return ensure_worker(file, load_pipeline(file).name, place, prefect)


def stop_serving(place: PlaceSettings) -> list[str]:
    """End the worker, its flows first; returns the names of what ran."""
    from deployments.services import down

    return down(place.state, only=["worker"], grace_seconds=WORKER_STOP_SECONDS)


def receive_pushes(*, pipelines: Sequence[str], place: str, host: str, port: int) -> None:
    """`reprise hook serve`"""
    from flows.push_handover import open_target
    from flows.push_receiver import guard, make_app
    from flows.push_server import listen, make_server

    guarded = guard([open_target(pipeline, place) for pipeline in pipelines])
    server = make_server(make_app(guarded, tell=say))
    with listen(host, port) as listening:
        for one in guarded:
            push = one.target.settings.push
            say(f"{one.target.name}: pushes of {push.repository}, branches {', '.join(push.branches)}")
        say(f"receiving at http://{host}:{listening.getsockname()[1]}/push")
        server.run(sockets=[listening])


def push_from_hook(before: str, after: str, ref: str, *, wait: float, pipeline: str, place: str, as_json: bool) -> None:
    """`reprise hook push`"""
    from flows.push_handover import local_push, open_target, sentence, wait_for

    target = open_target(pipeline, place)
    push, why = local_push(target, before, after, ref)
    if push is None:
        show_json({"state": "ignored", "reason": why}) if as_json else say(f"{target.name}: ignored, because {why}")
        return
    push_id, _ = target.queue.add(push)
    entry = wait_for(target, push_id, wait)
    if as_json:
        show_json(asdict(entry))
        return
    say(f"{target.name}: {sentence(entry)}")
    if entry.state == "waiting":
        say("it is kept: `reprise serve` or `reprise hook serve` hands it over")


def list_pushes(*, pipeline: str, place: str, as_json: bool) -> None:
    """`reprise hook list`"""
    from flows.push_handover import one_line, open_target

    entries: list[Entry] = open_target(pipeline, place).queue.entries()
    if as_json:
        show_json([asdict(entry) for entry in entries])
        return
    if not entries:
        say("no push yet")
        return
    rows = [
        [
            ago(e.received),
            e.push.branch,
            e.push.after[:7],
            e.push.source,
            e.state,
            e.action,
            one_line(e.reason) or (f"{time.time() - e.received:.0f} s" if e.state == "waiting" else ""),
        ]
        for e in reversed(entries)
    ]
    table(["received", "branch", "commit", "from", "state", "asks for", "why"], rows)
