"""A run that waited for a person and got none: cancelled in Prefect, out of time, or its flow run deleted.

While a person thinks, no process of the run lives, so nobody is told of such an end: the run's document would say
"waiting" for ever, and its page "press Resume". Whoever looks for dead flows (flows.zombies) looks here too. Such a run
can be resumed: it asks again. Not covered: the question and its answer (flows.approval).
"""

from __future__ import annotations

import time
from typing import Any

from deployments.errors import TryAgain
from flows.artifact import put
from flows.prefect_api import Prefect
from flows.result_page import headline, result_markdown
from flows.run import Run
from tasks.records import Store

FOLDER = "waiting"  # of the store: one small document for each run that waits, so that a look reads no others
ENDS = {"CANCELLED": "cancelled", "FAILED": "failed", "CRASHED": "failed"}


def remember_waiting(run: Run) -> None:
    """The run waits from here on, without a process."""
    run.store.write(f"{FOLDER}/{run.id}", {"run": run.id, "pipeline": run.plan.pipeline.name})


def settle(prefect: Prefect, store: Store) -> list[str]:
    """Write down how runs ended that waited; returns a sentence for each. Raises TryAgain without a server."""
    done = []
    for run in store.names(FOLDER):
        try:
            with store.lock(f"run-{run}"):  # held: it has been answered and goes on
                if said := _settle(prefect, store, run):
                    done.append(said)
        except TryAgain:
            if not store.held(f"run-{run}"):
                raise
    return done


def _settle(prefect: Prefect, store: Store, run: str) -> str:
    document: dict[str, Any] = store.read(f"runs/{run}") or {"status": "gone"}
    if document["status"] == "waiting":
        flow_run = document["links"].get("prefect_flow_run", "")
        found = prefect.run(flow_run) if flow_run else None
        status = ENDS.get(found["state"]["type"], "") if found else "cancelled"
        if not status:
            return ""  # it waits, or somebody has answered and it starts
        said = (found or {"state": {}})["state"].get("message") or ("" if found else "its flow run was deleted")
        why = f" ({said.rstrip('.')})" if said else ""
        message = f"{status} while it waited for a decision{why}; `reprise resume {run}` asks again"
        document |= {"status": status, "ended": time.time(), "message": message, "closed": True}
        store.write(f"runs/{run}", document)
        if found:
            name = f"{document['pipeline']}-result"
            put(prefect, flow_run, name, "markdown", result_markdown(document), headline(document))
    (store.path / FOLDER / f"{run}.json").unlink(missing_ok=True)
    return f"{run}: {document['message']}" if document["status"] in ENDS.values() else ""
