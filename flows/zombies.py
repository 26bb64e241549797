"""Flows that died without a word: found, marked in Prefect, and resumed once.

A running flow holds a lock that dies with its process (flows.prefect_start); a flow run that Prefect calls running
while nobody holds its lock is dead. It becomes Crashed, and, if Prefect started it, scheduled once more: it goes on
where it was. `reprise serve` looks every few seconds, on a cluster a pod does (flows.cluster_zombies); without them
Prefect's automation marks it by its heartbeats (flows.triggers), and the next look resumes it. A server that was away
for longer than three heartbeats has heard none from the living either, and calls them Crashed: those are put right
again. A flow that was told to end (`reprise down`, a slot that Prefect took back) has saved and is resumed as often as
that happens; one that died is resumed once. Not covered: trainers (flows resume those).
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from flows.prefect_api import Prefect
from flows.prefect_start import flow_lock, run_of
from flows.unanswered import settle
from tasks.records import Store

YOUNG_SECONDS = {"RUNNING": 30.0, "PENDING": 120.0, "CANCELLING": 30.0}  # from a state to the lock, on a busy machine
FORGOTTEN_SECONDS = 86_400.0  # an older crash is history
REVIVALS = 1  # of a flow that died without a word: what killed it may kill it again
RETURNS = 20  # of one that ended in order, so that no loop is for ever
SILENCE = "No heartbeat for"  # how the automation's message begins
Verdict = Literal["leave", "mark", "resume", "cancel", "correct"]


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A flow run as Prefect and the store tell of it."""

    state: str  # Prefect's state type
    age_seconds: float  # of the state
    alive: bool  # its lock is held, or its run's by another
    unheard: bool  # its own lock is held, and the automation called it crashed
    known: bool  # a run document of it exists
    unfinished: bool  # that document says running, or interrupted
    interrupted: bool  # it wrote interrupted into it itself: it ended in order
    deployed: bool  # Prefect can start it again
    revivals: int  # how often it was resumed after such an end


def judge(seen: Sighting) -> Verdict:
    """What to do about a flow run. Pure."""
    if seen.state == "CRASHED" and seen.unheard:
        return "correct"
    if seen.alive:
        return "leave"
    if seen.state == "CRASHED":
        most = RETURNS if seen.interrupted else REVIVALS
        again = seen.deployed and seen.revivals < most and seen.age_seconds < FORGOTTEN_SECONDS
        return "resume" if again and (seen.unfinished or not seen.known) else "leave"
    if seen.state not in YOUNG_SECONDS:
        return "leave"
    sure = seen.known and seen.unfinished and seen.state == "RUNNING"  # it had its lock, and lost it
    if seen.age_seconds < (2.0 if sure else YOUNG_SECONDS[seen.state]):
        return "leave"
    if seen.state == "CANCELLING":
        return "cancel"
    return "resume" if seen.deployed and seen.revivals < REVIVALS else "mark"


def sweep(
    prefect: Prefect,
    store: Store,
    deployment: str = "",
    *,
    pool: str = "",
    looked_after: Callable[[str], bool] = lambda flow_run: False,
) -> list[str]:
    """Look once at each flow run of this store that could be dead; returns what was done, a sentence each.

    `deployment` is the id of the store's pipeline, `pool` the work pool whose pipelines share the store. Others' runs
    on the same server are none of ours: only their own store has their locks. `looked_after` says whether somebody
    else starts the process of a flow run again. Raises TryAgain without a server.
    """
    done = []
    for flow_run in prefect.runs(states=["RUNNING", "PENDING", "CANCELLING", "CRASHED"]):
        seen = _look(store, flow_run)
        ours = flow_run.get("deployment_id") == deployment or (pool and flow_run.get("work_pool_name") == pool)
        if not ours and not seen.known:
            continue
        verdict = judge(seen)
        if verdict == "leave" or (verdict != "correct" and looked_after(flow_run["id"])):
            continue
        done.append(_act(prefect, store, flow_run, verdict))
    return done + settle(prefect, store)


def _look(store: Store, flow_run: dict[str, Any]) -> Sighting:
    document = run_of(store, flow_run["id"])
    state = flow_run["state"]
    since = datetime.datetime.fromisoformat(state["timestamp"])
    lives = store.held(flow_lock(flow_run["id"]))
    return Sighting(
        state=state["type"],
        age_seconds=time.time() - since.timestamp(),
        alive=lives or (document is not None and store.held(f"run-{document['run']}")),
        unheard=lives and (state.get("message") or "").startswith(SILENCE),
        known=document is not None,
        unfinished=document is not None and document["status"] in ("running", "interrupted"),
        interrupted=_interrupted(store, document),
        deployed=bool(flow_run.get("deployment_id")),
        revivals=_revivals(store, flow_run["id"]).get(_kind(_interrupted(store, document)), 0),
    )


def _interrupted(store: Store, document: dict[str, Any] | None) -> bool:
    """Whether the run itself wrote that it was interrupted; of a dead one only readers say so."""
    return document is not None and (store.read(f"runs/{document['run']}") or {}).get("status") == "interrupted"


def _revivals(store: Store, flow_id: str) -> dict[str, int]:
    return store.read(f"revivals/{flow_id}") or {}


def _kind(interrupted: bool) -> str:
    return "returns" if interrupted else "count"


def _act(prefect: Prefect, store: Store, flow_run: dict[str, Any], verdict: Verdict) -> str:
    name, flow_id = flow_run["name"], flow_run["id"]
    if verdict == "correct":
        # Forced: it has left a final state. Crashed, it could neither be cancelled nor wait for an approval.
        prefect.set_state(flow_id, "RUNNING", "Running", "It lives: its heartbeats were not heard.", force=True)
        return f"{name}: lives, though its heartbeats were not heard; running again"
    if verdict == "cancel":
        prefect.set_state(flow_id, "CANCELLED", "Cancelled", "Its process was gone already.")
        return f"{name}: was gone when it was cancelled"
    if flow_run["state"]["type"] != "CRASHED":
        # Not forced: only an orchestrated transition gives the concurrency slot back.
        prefect.set_state(flow_id, "CRASHED", "Crashed", "Its process died without a word.")
    if verdict == "mark":
        return f"{name}: its process died; marked as crashed"
    interrupted = _interrupted(store, run_of(store, flow_id))
    counted, kind = _revivals(store, flow_id), _kind(interrupted)
    # Counted first: once, whatever comes.
    store.write(f"revivals/{flow_id}", {**counted, kind: counted.get(kind, 0) + 1})
    why = "it was interrupted" if interrupted else "its process died"
    prefect.set_state(flow_id, "SCHEDULED", "AwaitingRetry", f"Resumed after {why}.", force=True)
    return f"{name}: {why}; resumed"
