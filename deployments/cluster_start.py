"""What keeps a workload from starting: told when it lasts, and waited for or given up with the reason.

A suspension by a queue, a pod without a node, an image or a claim that is not there, an object whose pods are not made.
Time in a queue is not counted against the wait for a node. What has no cure is an error, at once or after the place's
patience. Not covered: words for what holds a pod (pod_diagnosis.py), what is refused before it is made (guard.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deployments.cluster_outcome import Ending
from deployments.errors import PreflightError
from deployments.job_status import is_suspended
from deployments.kube_watch import is_gone, uid_of
from deployments.pod_causes import is_scheduled
from deployments.pod_diagnosis import FATAL, HOPELESS, Waiting, not_created, waiting
from deployments.workload import Workload

if TYPE_CHECKING:
    from deployments.cluster import Cluster

Json = dict[str, Any]
TELL_SECONDS = 5.0  # a pod that waits for longer is told of
EVENTS_SECONDS = 15.0  # when events are first asked for, then more rarely, while no status tells why it does not start


class Start:
    """Looks at one workload until its pods run; also again, when they are replaced."""

    def __init__(self, cluster: Cluster, workload: Workload, say: Callable[[str], None]) -> None:
        """`say`: hears what it waits for."""
        self.cluster, self.workload, self.say = cluster, workload, say
        self._told, self._waiting_since, self._suspended_at = "", 0.0, 0.0
        self._old: set[str] = set()  # uids of pods from before a suspension
        self._events_at, self._events_every = 0.0, EVENTS_SECONDS
        self._held_by_event: Waiting | None = None

    @property
    def waits(self) -> bool:
        """Whether something held it back at the last look."""
        return bool(self._waiting_since)

    def current(self, item: Json, pods: list[Json]) -> list[Json]:
        """The pods that count: those of before a suspension are on their way out."""
        if is_suspended(item):
            self._suspended_at = time.time()
            self._old |= {uid_of(p) for p in pods}
            return pods
        return [p for p in pods if uid_of(p) not in self._old]

    def look(self, item: Json, pods: list[Json], created: float) -> Ending | None:
        """What to end it for, or None to wait on. `pods`: the current ones; `created`: unix seconds."""
        if is_suspended(item):
            held: Waiting | None = Waiting(reason="Suspended", sentence="it is suspended, by its queue or a person")
        else:
            held = self._held(item, [p for p in pods if not is_gone(p)])
        if held is None:
            self._told, self._waiting_since = "", 0.0
        else:
            self._waiting_since = self._waiting_since or time.time()
            since = time.time() - self._waiting_since
            if since > TELL_SECONDS or held.reason in HOPELESS:
                self._tell(held.sentence)
            if held.reason in HOPELESS or (held.reason in FATAL and since > self.cluster.start_patience):
                error = PreflightError(f"{self.workload.name} cannot start: {held.sentence}")
                return Ending(cause="user_error", reason=held.sentence, error=error)
        patience = self.workload.start_seconds
        replicas = self.workload.replicas if self.workload.image == "train" else 1
        started = len([p for p in pods if is_scheduled(p)]) >= replicas
        waited = time.time() - max(created, self._suspended_at)  # a place in a queue is no want of a node
        if patience is not None and not started and waited > patience:
            why = held.sentence if held else "no pod was scheduled"
            return Ending(cause="no_capacity", reason=f"no node within {patience:g} s: {why}")
        return None

    def _held(self, item: Json, pods: list[Json]) -> Waiting | None:
        """What keeps it from starting; the events are asked for when the pods' status does not tell."""
        found = next((w for p in pods if (w := waiting(p))), None)
        running = pods and all(_phase(p) != "Pending" for p in pods)
        if found is not None or running:
            self._events_at, self._events_every = 0.0, EVENTS_SECONDS
            return found
        now = time.monotonic()
        self._events_at = self._events_at or now + EVENTS_SECONDS
        if now > self._events_at:
            self._events_every = min(8 * EVENTS_SECONDS, 2 * self._events_every)
            self._events_at, self._held_by_event = now + self._events_every, None
            for about in pods or [item]:
                kind = "Pod" if pods else ("PyTorchJob" if self.workload.image == "train" else "Job")
                events = self.cluster.events_about(kind, about["metadata"]["name"])
                self._held_by_event = self._held_by_event or (waiting(about, events) if pods else not_created(events))
        return self._held_by_event

    def _tell(self, text: str) -> None:
        """Say what it waits for, once, and again when it changes by more than numbers."""
        plain = re.sub(r"\d+", "", text)
        if plain != self._told:
            self._told = plain
            self.say(f"waiting: {text}")


def _phase(pod: Json) -> str:
    return str((pod.get("status") or {}).get("phase"))
