"""A flow run of a cluster on this terminal until it ends: the lines of a laptop's run, Ctrl-C, exit codes.

    document = Follower(prefect=prefect, flow_run="...", settings=settings, quiet=False).follow()

Everything comes through Prefect: states, and the run's document as its pod tells it (flows.run_mirror). Not covered:
asking for the run (flows.submit), runs that have ended (flows.cluster_runs).
"""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass, field
from typing import Any

from deployments.errors import WORDS, GiveUp, StepError, TryAgain, Unreachable
from flows.cluster_settings import ClusterSettings
from flows.display import say
from flows.execute import Interrupted
from flows.prefect_api import Prefect
from flows.run_mirror import read_mirror
from flows.watch import Watch
from flows.zombies import SILENCE

POLL_SECONDS = 1.0
AWAY_SECONDS = 300.0  # that Prefect may be away while a run is followed
STOPPED_SECONDS = 15.0  # from the run's own word that it is cancelled to Prefect's
SILENT_SECONDS = 600.0  # a lost node: until its pods are evicted, and another node is there
BEFORE = ("SCHEDULED", "PENDING")
ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
_RAISED = re.compile(r"(?:Flow run encountered an exception: )?(\w+): (.*)", re.DOTALL)


@dataclass(kw_only=True)
class Follower:
    """One flow run as this terminal shows it. `quiet`: not at all."""

    prefect: Prefect
    flow_run: str
    settings: ClusterSettings
    quiet: bool
    command: str = "run"  # of `reprise`, that asked for it
    patience: float | None = None  # seconds until it has begun; None: however long that takes
    document: dict[str, Any] = field(default_factory=dict)
    cancelled: bool = False
    told: str = ""
    silent_since: float | None = None  # monotonic
    stopped_since: float | None = None
    began: float = field(default_factory=time.monotonic)

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
        if state["type"] == "CANCELLING" and self.document.get("status") == "cancelled":
            self._finish_cancelling()
        return state

    def _finish_cancelling(self) -> None:
        """Its flow has stopped everything and could not tell Prefect, which was busy: after a while we do."""
        self.stopped_since = self.stopped_since or time.monotonic()
        if time.monotonic() - self.stopped_since > STOPPED_SECONDS:
            with contextlib.suppress(TryAgain):
                self.prefect.set_state(self.flow_run, "CANCELLED", "Cancelled", "It has stopped.", force=True)

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
        if self.patience is not None and state["type"] in BEFORE and time.monotonic() - self.began > self.patience:
            self._give_up(name, message)

    def _cancel(self) -> None:
        self.cancelled = True
        first = "; its training saves first" if self.command == "run" else ""
        say(f"cancelling{first} (Ctrl-C again leaves it)", style="yellow")
        self.prefect.set_state(self.flow_run, "CANCELLING", "Cancelling", f"Cancelled by `reprise {self.command}`.")

    def _give_up(self, name: str, message: str) -> None:
        """Nobody waits for it any more, so it must not begin later."""
        self.prefect.set_state(self.flow_run, "CANCELLING", "Cancelling", "It did not begin in time.")
        raise Unreachable(
            f"`reprise {self.command}`: flow run {self.flow_run} did not begin within {self.patience:g} s, it is {name}"
            + (f": {message}" if message else "")
            + f"; whether the worker and the pod come up: kubectl -n reprise-services get pods, kubectl -n "
            f"{self.settings.place.namespace} get pods"
        )

    def _ended(self, state: dict[str, Any]) -> dict[str, Any]:
        """The document of a run that did what was asked; its error, with its exit code, otherwise."""
        if state["type"] == "COMPLETED":
            return self.document
        run = self.document.get("run", f"flow run {self.flow_run}")
        goes_on = "goes on where it was" if self.command == "run" else "asks again"
        again = f"`reprise {self.command} --place cluster` {goes_on}"
        if state["type"] == "CANCELLED" or self.cancelled:
            raise Interrupted(f"{run}: cancelled; {again}")
        if state["type"] == "CRASHED":
            raise TryAgain(f"{run}: its flow crashed: {state.get('message')}; {again}")
        raise self._failure(str(state.get("message") or state["name"]))

    def _failure(self, message: str) -> StepError:
        error = self.document.get("error") or ""
        if error:
            return WORDS.get(error, GiveUp)(str(self.document["message"]))
        found = _RAISED.fullmatch(message)
        return WORDS.get(found[1], GiveUp)(found[2]) if found else GiveUp(message)
