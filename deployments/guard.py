"""Before an object is made: could its pods ever be placed? If not it is refused in milliseconds, and nothing is made.

    Guard(api, place).check(manifest(workload, place))      # PreflightError, exit code 3

First the nodes and what could make one (Karpenter's NodePools, a cluster autoscaler): three requests at once, faster
than a scheduler that gives the pod its mark. Where there may be a place, the rest is asked: Pod Security, quotas,
limits, claims, what DaemonSets take. What has passed is believed for some seconds; a refusal is always from a fresh
look. What may not be read refuses nothing.
Not covered: what is there already, the faults that a preflight only tells of (preflight.py has every look).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from deployments.cluster_place import ClusterPlace
from deployments.kube_api import KubeApi
from deployments.preflight import case_of, failures, refuse
from deployments.preflight_access import look_at_operator
from deployments.preflight_findings import Case, Finding
from deployments.preflight_pods import look_at_references
from deployments.preflight_quota import look_at_limit_ranges, look_at_quotas
from deployments.preflight_scheduling import look_at_places
from deployments.preflight_security import look_at_security
from deployments.preflight_storage import look_at_claims
from deployments.snapshot import Snapshot
from deployments.snapshot_take import Taker

Looks = tuple[Callable[[Case], Iterator[Finding]], ...]
LOOKS: Looks = (
    look_at_operator,
    look_at_security,
    look_at_places,
    look_at_quotas,
    look_at_limit_ranges,
    look_at_claims,
    look_at_references,
)
TOLD = {"free capacity", "place", "nodes", "node selector", "taints", "resources", "cordoned nodes", "quota"}  # waits
BELIEVED = 10.0  # seconds


class Guard:
    """Looks at one cluster before objects are made on it. Safe for many threads, which share a look."""

    def __init__(self, api: KubeApi, place: ClusterPlace) -> None:
        """Nothing is asked yet."""
        self.api, self.place = api, place
        self._lock = threading.Lock()
        self._seen: Snapshot | None = None
        self._at = 0.0

    def check(self, made: Mapping[str, Any], *, otherwise: Mapping[str, Any] | None = None) -> list[Finding]:
        """Refuse a Job or PyTorchJob whose pods could never be placed. Returns what it will have to wait for.

        `otherwise`: what is asked for after a while if this finds no place; while that could have one, nothing is
        refused. Raises PreflightError, or Unreachable if the API stays away for the connection's patience.
        """
        with self._lock:
            if self._seen is not None and time.monotonic() - self._at < BELIEVED:
                found = self._judge(made, self._seen, LOOKS)
                if not failures(found):
                    return _told(found)
            self._seen = None
            taker = Taker(self.api, self.place, patience=self.api.patience)
            taker.ask(taker.nodes, taker.pools, taker.autoscaler)
            if waits := self._refuse(made, otherwise, taker.snapshot(), (look_at_places,)):
                return waits
            taker.ask(taker.operators, *taker.bounds())
            seen = taker.snapshot()
            if waits := self._refuse(made, otherwise, seen, LOOKS):
                return waits
            self._seen, self._at = seen, time.monotonic()
            return _told(self._judge(made, seen, LOOKS))

    def _refuse(
        self, made: Mapping[str, Any], otherwise: Mapping[str, Any] | None, seen: Snapshot, looks: Looks
    ) -> list[Finding]:
        """Raise for what fails, or return it where `otherwise` does not; [] if nothing fails."""
        found = failures(self._judge(made, seen, looks))
        if otherwise is None or failures(self._judge(otherwise, seen, looks)):
            refuse(found)
        return [replace(f, verdict="WARN") for f in found]

    def _judge(self, made: Mapping[str, Any], seen: Snapshot, looks: Looks) -> list[Finding]:
        case = case_of(made, seen, self.place)
        return [finding for look in looks for finding in look(case)]


def _told(found: list[Finding]) -> list[Finding]:
    return [f for f in found if f.verdict == "WARN" and f.what in TOLD]
