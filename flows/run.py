"""One run: its identity, its document in the store, its lock, and the events that people watch.

The document (`runs/<run>.json`) is what `reprise show` prints: written at every transition, so that a killed flow
leaves the truth behind. A run whose process died is found by its free lock and goes on under its own name when the same
work is asked for again. Not covered: Prefect (flows.steps), what the steps do (tasks).
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError
from deployments.workload import Runner
from flows.plan import Plan
from tasks.records import Attempt, StepRecord, Store

Event = Callable[[str, dict[str, Any]], None]
UNFINISHED = ("running", "interrupted", "cancelled", "failed")
FINISHED = ("succeeded", "unchanged", "refused")


_SAVING = threading.Lock()


@dataclass(kw_only=True)
class Run:
    """A run in progress: what the flow and its steps share."""

    id: str
    plan: Plan
    store: Store
    runner: Runner
    urls: dict[str, str]  # of the services: prefect, mlflow, inference, management
    document: dict[str, Any]
    on_event: Event = lambda kind, fields: None
    workload: str = ""  # the one that runs now, to be stopped when somebody interrupts us
    results: dict[str, Any] = field(default_factory=dict)  # step name -> its typed result

    @property
    def number(self) -> str:
        """The run's number among those of its pipeline."""
        return self.id.rpartition("-")[2]

    def save(self) -> None:
        """Write the document as it is now. One at a time: the training's thread tells of its attempts while the flow
        tells how the run ended, and the older text must not come last."""
        with _SAVING:
            self.store.write(f"runs/{self.id}", self.document)

    def event(self, kind: str, **fields: Any) -> None:
        """Tell whoever watches."""
        self.on_event(kind, fields)

    def update(self, **fields: Any) -> None:
        """Change the document and write it."""
        self.document.update(fields)
        self.save()

    def step_row(self, name: str) -> dict[str, Any]:
        """The row of one step in the document."""
        row: dict[str, Any] = next(r for r in self.document["steps"] if r["name"] == name)
        return row

    def step_changed(self, name: str, **fields: Any) -> None:
        """Change one step's row, write it, tell it."""
        self.step_row(name).update(fields)
        self.save()
        self.event("step", **self.step_row(name))

    def attempts_changed(self, attempts: list[Attempt]) -> None:
        """The ledger of this run's training, as it is now."""
        self.update(attempts=[attempt_row(a) for a in attempts])
        self.event("attempts", attempts=self.document["attempts"])

    def finish_step(self, name: str, result: dict[str, Any], seconds: float) -> None:
        """Record a step's effects as done: from now on it is reused."""
        planned, row = self.plan.steps[name], self.step_row(name)
        self.store.finish_step(
            StepRecord(
                key=planned.key,
                step=name,
                inputs=planned.inputs,
                result=result,
                run=self.id,
                started=row["started"],
                ended=time.time(),
                seconds=seconds,
            )
        )
        last = f"pipelines/{self.plan.pipeline.name}"
        self.store.write(last, {**(self.store.read(last) or {}), name: planned.key})


def attempt_row(attempt: Attempt) -> dict[str, Any]:
    """An attempt for people and for --json: the ledger's row and the steps it lost."""
    return {**asdict(attempt), "steps_lost": max(0, attempt.reached_step - attempt.to_step)}


def new_document(plan: Plan, *, run: str, rev: str, overrides: list[str], cause: str) -> dict[str, Any]:
    """The document of a run that has just begun."""
    return {
        "run": run,
        "pipeline": plan.pipeline.name,
        "pipeline_file": str(plan.pipeline.file),
        "place": plan.place.kind,
        "rev": rev,
        "git_sha": plan.git_sha,
        "data_digest": plan.data.digest,
        "code_digest": plan.code_digest,
        "overrides": overrides,
        "cause": cause,
        "status": "running",
        "closed": False,  # finished, reported and told
        "message": "",
        "started": time.time(),
        "budget_since": time.time(),
        "ended": None,
        "process": os.getpid(),
        "host": socket.gethostname(),
        "steps": [_step_document(s.name, s.key, s.reason) for s in plan.steps.values()],
        "attempts": [],
        "model_version": None,
        "mar_sha256": None,
        "endpoint": None,
        "metrics": {},
        "links": {},
    }


def _step_document(name: str, key: str, reason: str) -> dict[str, Any]:
    return {
        "name": name,
        "key": key,
        "status": "pending",
        "reused": False,
        "reason": reason,
        "started": None,
        "ended": None,
        "seconds": 0.0,
    }


@contextmanager
def open_run(
    plan: Plan, store: Store, *, rev: str, overrides: list[str], cause: str, resume: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Take the run's lock and yield (id, document): of the unfinished run of the same work, or of a new one."""
    document = read_run(store, resume) if resume else unfinished(plan, store)
    if document:
        run = str(document["run"])
        document = {
            **new_document(plan, run=run, rev=rev, overrides=overrides, cause=str(document["cause"])),
            "started": document["started"],
            "rev": document["rev"],  # as somebody asked for it; it goes on at its commit
            # A flow that died goes on within its budgets; whoever resumes a failed or cancelled run renews them.
            "budget_since": document["budget_since"] if document["status"] == "interrupted" else time.time(),
            "attempts": document["attempts"],
            "resumed": document.get("resumed", 0) + 1,
            "previous": {"status": document["status"], "prefect": document["links"].get("prefect_flow_run", "")},
        }
    else:
        run = _new_id(store, plan.pipeline.name)
        document = new_document(plan, run=run, rev=rev, overrides=overrides, cause=cause)
    with store.lock(f"run-{run}"):
        store.write(f"runs/{run}", document)
        yield run, document


def unfinished(plan: Plan, store: Store) -> dict[str, Any] | None:
    """The newest run of this pipeline, if it did not finish and was about the same work."""
    for run in reversed(run_ids(store, plan.pipeline.name)):
        if store.read(f"runs/{run}") is None:  # claimed by a process that died before it wrote
            continue
        document = read_run(store, run)
        same = [s["key"] for s in document["steps"]] == [s.key for s in plan.steps.values()]
        return document if same and document["status"] in UNFINISHED and not store.held(f"run-{run}") else None
    return None


def run_ids(store: Store, pipeline: str | None = None) -> list[str]:
    """Ids of runs (of one pipeline), oldest first."""
    names = [n for n in store.names("runs") if pipeline is None or n.rpartition("-")[0] == pipeline]
    return sorted(names, key=lambda n: (n.rpartition("-")[0], int(n.rpartition("-")[2])))


def read_run(store: Store, run: str) -> dict[str, Any]:
    """The document of a run, its status corrected if its process died. Raises ConfigError for an unknown id."""
    document: dict[str, Any] | None = store.read(f"runs/{run}")
    if document is None:
        known = run_ids(store)[-5:]
        hint = f"the last runs are: {', '.join(known)}" if known else "there is none yet: reprise run"
        raise ConfigError(f"run {run!r} does not exist in {store.path}; {hint}")
    if document["status"] == "running" and not store.held(f"run-{run}"):
        document["status"] = "interrupted"
        document["message"] = f"its process {document['process']} died; `reprise resume {run}` goes on"
    return document


def _new_id(store: Store, pipeline: str) -> str:
    """`<pipeline>-<n>`, claimed by creating its file, so that two at once get two."""
    folder = Path(store.path) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    ids = run_ids(store, pipeline)
    number = int(ids[-1].rpartition("-")[2]) if ids else 0
    while True:
        number += 1
        try:
            with (folder / f"{pipeline}-{number}.json").open("x") as claim:
                claim.write("null")
            return f"{pipeline}-{number}"
        except FileExistsError:
            continue
