"""`reprise run --place cluster`: a flow run in the cluster, followed from here until it ends.

    reprise run --place cluster            # Ctrl-C cancels it; --detach leaves it to itself

Here the order is checked (settings, revision, pushed or not), the deployment renewed and the run asked for; the flow
itself is a pod that Prefect's worker starts. What it tells comes back through Prefect (flows.run_mirror), so this
machine needs Prefect's URL and nothing else of the cluster. Not covered: the flow's side (flows.prefect_start).
"""

from __future__ import annotations

import os
import re
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from deployments.errors import WORDS, ConfigError, GiveUp, PreflightError, StepError, TryAgain, Unreachable
from flows.cluster_deployment import register_on_cluster, register_rollback
from flows.cluster_settings import ClusterSettings, load_cluster
from flows.display import say
from flows.execute import Interrupted
from flows.prefect_api import Prefect
from flows.project import Project
from flows.run_mirror import read_mirror, told
from flows.settings import load_pipeline
from flows.start import Order, at_revision, pipeline_file
from flows.watch import Watch
from flows.zombies import SILENCE

POLL_SECONDS = 1.0
AWAY_SECONDS = 300.0  # that Prefect may be away while a run is followed
WAITING_SECONDS = 20.0  # a run that no worker takes is told of
SILENT_SECONDS = 600.0  # a lost node: until its pods are evicted, and another node is there
ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
_RAISED = re.compile(r"(?:Flow run encountered an exception: )?(\w+): (.*)", re.DOTALL)


def submit(order: Order, *, detach: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run an order on its cluster; returns the run's document (with `detach` what Prefect knows of the flow run).

    Raises ConfigError, PreflightError (not pushed, no pool), TryAgain (Prefect is away), what the run itself raised, or
    Interrupted.
    """
    file = pipeline_file(order)
    settings = load_cluster(order.place, file.parent)
    if order.interruptions:
        raise ConfigError(f"--interrupt {order.interruptions[0]}: only a laptop plays the spot market; leave it out")
    project, pipeline, sha = at_revision(order, file)
    git = _git_url(project, settings, sha)
    prefect = _answering(Prefect(url=prefect_url(settings)))
    deployment = register_on_cluster(prefect, pipeline, settings, git=git)
    flow_run = prefect.start(
        deployment,
        parameters={"rev": sha, "overrides": list(order.overrides), "cause": order.cause},
        name=f"{pipeline.name} {sha[:7]} {order.cause}",
        tags=["reprise", pipeline.name],
        idempotency_key=str(uuid.uuid4()),
    )
    page = f"{settings.services.prefect_outside or prefect.url}/runs/flow-run/{flow_run['id']}"
    if not quiet:
        say(f"{pipeline.name} at {sha[:7]} on {settings.file.name}: {page}")
    if detach:
        return {"flow_run": flow_run["id"], "pipeline": pipeline.name, "git_sha": sha, "links": {"prefect": page}}
    document = _Follower(prefect=prefect, flow_run=flow_run["id"], settings=settings, quiet=quiet).follow()
    if not document:
        raise TryAgain(f"the run has ended and its document did not come through Prefect: {page}")
    return document


def ask_for_rollback(order: Order, to: str) -> dict[str, Any]:
    """An earlier version back in service on the order's cluster; returns what its flow says. Raises as `submit`."""
    file = pipeline_file(order)
    settings, pipeline = load_cluster(order.place, file.parent), load_pipeline(file)
    prefect = _answering(Prefect(url=prefect_url(settings)))
    flow_run = prefect.start(
        register_rollback(prefect, pipeline, settings),
        parameters={"to": to},
        name=f"{pipeline.name} back to {to or 'the version before'}",
        tags=["reprise", pipeline.name],
        idempotency_key=str(uuid.uuid4()),
    )
    _Follower(prefect=prefect, flow_run=flow_run["id"], settings=settings, quiet=True).follow()
    return told(prefect, flow_run["id"])


def prefect_url(settings: ClusterSettings) -> str:
    """Prefect as this machine reaches it: [services] prefect_outside, else $PREFECT_API_URL, else as pods do."""
    outside = settings.services.prefect_outside or os.environ.get("PREFECT_API_URL", "").rstrip("/").removesuffix(
        "/api"
    )
    return outside or settings.services.prefect


def _answering(prefect: Prefect) -> Prefect:
    """The same, asked once. Raises Unreachable or PreflightError with what this machine needs for it."""
    try:
        prefect.call("POST", "/work_pools/filter", {"limit": 1})
    except TryAgain as error:
        said = str(error).partition("; start it")[0]
        raise Unreachable(
            f"{said}; from outside the cluster: kubectl -n reprise-services port-forward service/prefect 4200, and "
            'prefect_outside = "http://127.0.0.1:4200" of [services] in cluster.toml'
        ) from None
    except GiveUp as error:
        if " answered 401 " not in str(error):
            raise
        raise PreflightError(
            f"Prefect at {prefect.url} wants a password; expected it in PREFECT_API_AUTH_STRING: kubectl -n reprise "
            "get secret prefect-auth -o jsonpath='{.data.auth-string}' | base64 -d"
        ) from None
    return prefect


def _git_url(project: Project, settings: ClusterSettings, sha: str) -> str:
    """Where the pod clones from. Raises ConfigError without a remote, PreflightError for a commit that is not there."""
    origin = _git(project, "remote", "get-url", "origin")
    url = settings.project.git or origin
    if not url:
        raise ConfigError(
            f"{project.root}: no remote `origin`, and a pod of the cluster clones the project; add it: "
            "git remote add origin URL && git push, or [project] git in cluster.toml"
        )
    if origin and not _git(project, "for-each-ref", f"--contains={sha}", "refs/remotes/origin", "--count=1"):
        raise PreflightError(
            f"commit {sha[:7]} is on no branch of {origin} that this checkout knows of, so no pod could clone it: "
            "git push (or git fetch, if it is there by now)"
        )
    return url


def _git(project: Project, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=project.root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


@dataclass(kw_only=True)
class _Follower:
    """One flow run as this terminal shows it."""

    prefect: Prefect
    flow_run: str
    settings: ClusterSettings
    quiet: bool
    document: dict[str, Any] = field(default_factory=dict)
    cancelled: bool = False
    told: str = ""
    silent_since: float | None = None  # monotonic

    def follow(self) -> dict[str, Any]:
        """Until it ends. Ctrl-C cancels the run and goes on watching; a second one leaves it."""
        watch = Watch(quiet=self.quiet)
        try:
            while True:
                try:
                    state = self._look(watch)
                    if state["type"] in ENDS and not self._may_come_back(state):
                        return self._ended(state)
                    time.sleep(POLL_SECONDS)
                except KeyboardInterrupt:
                    if self.cancelled:
                        raise
                    self._cancel()
        finally:
            watch.close()

    def _may_come_back(self, state: dict[str, Any]) -> bool:
        """Whether a flow is only silent, on a node that went away: its Job starts another pod once that is sure."""
        if state["type"] != "CRASHED" or not str(state.get("message")).startswith(SILENCE):
            self.silent_since = None
            return False
        if self.silent_since is None:
            self.silent_since = time.monotonic()
            if not self.quiet:
                say(f"  {state['message']} Waiting for its Job to start another pod", style="yellow")
        return time.monotonic() - self.silent_since < SILENT_SECONDS

    def _look(self, watch: Watch) -> dict[str, Any]:
        """The state, after whatever is new has been shown."""
        since = time.monotonic()
        while True:
            try:
                flow_run = self.prefect.run(self.flow_run)
                seen = read_mirror(self.prefect, self.flow_run)
                break
            except TryAgain as error:
                if time.monotonic() - since > AWAY_SECONDS:
                    raise TryAgain(f"{error}\nthe run goes on in the cluster: flow run {self.flow_run}") from error
                time.sleep(POLL_SECONDS)
        if flow_run is None:
            raise GiveUp(f"flow run {self.flow_run} was deleted from Prefect")
        state: dict[str, Any] = flow_run["state"]
        if seen is not None:
            self._show(watch, seen)
        elif state["type"] not in ENDS:
            self._tell_waiting(state, flow_run)
        return state

    def _show(self, watch: Watch, seen: dict[str, Any]) -> None:
        before = {s["name"]: s["status"] for s in self.document.get("steps", ())}
        document = seen["document"]
        for step in document["steps"]:
            moved = step["status"] == "cancelled" and document["status"] != "cancelled"  # its flow gets another pod
            if step["status"] not in ("pending", before.get(step["name"])) and not moved:
                watch("step", step)
        if document["attempts"] != self.document.get("attempts", []):
            watch("attempts", {"attempts": document["attempts"]})
        if seen["line"]:
            watch("line", {"step": seen["line"][0], "line": seen["line"][1]})
        self.document = document

    def _tell_waiting(self, state: dict[str, Any], flow_run: dict[str, Any]) -> None:
        name, message = str(state["name"]), str(state.get("message") or "")
        pool = self.settings.place.work_pool
        if name == "Late":
            message = f"no worker of pool {pool!r} has taken it: kubectl -n reprise-services get pods"
        elif name == "AwaitingConcurrencySlot":
            message = "another run of this pipeline is in progress"
        text = f"  {name}" + (f": {message}" if message and message != flow_run.get("name") else "")
        if text != self.told and not self.quiet:
            say(text, style="dim")
        self.told = text

    def _cancel(self) -> None:
        self.cancelled = True
        say("cancelling; its training saves first (Ctrl-C again leaves it)", style="yellow")
        self.prefect.set_state(self.flow_run, "CANCELLING", "Cancelling", "Cancelled by `reprise run`.")

    def _ended(self, state: dict[str, Any]) -> dict[str, Any]:
        """The document of a run that did what was asked; its error, with its exit code, otherwise."""
        if state["type"] == "COMPLETED":
            return self.document
        run = self.document.get("run", f"flow run {self.flow_run}")
        if state["type"] == "CANCELLED" or self.cancelled:
            raise Interrupted(f"{run}: cancelled; `reprise run --place cluster` goes on where it was")
        if state["type"] == "CRASHED":
            raise TryAgain(f"{run}: its flow crashed: {state.get('message')}; `reprise run --place cluster` goes on")
        raise self._failure(str(state.get("message") or state["name"]))

    def _failure(self, message: str) -> StepError:
        error = self.document.get("error") or ""
        if error:
            return WORDS.get(error, GiveUp)(str(self.document["message"]))
        found = _RAISED.fullmatch(message)
        return WORDS.get(found[1], GiveUp)(found[2]) if found else GiveUp(message)
