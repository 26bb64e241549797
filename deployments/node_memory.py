"""Nodes as they were last seen: a node that is gone cannot be asked any more what it was.

Not covered: what a node's labels and taints mean (pod_causes.py).
"""

from __future__ import annotations

import time
from typing import Any, Protocol

Json = dict[str, Any]
AGAIN_SECONDS = 15.0  # how often a node is asked for anew, where that matters


class ReadNode(Protocol):
    """Reads a node; see Cluster.node."""

    def __call__(self, name: str, *, before: Json | None = None) -> Json: ...


class NodeMemory:
    """The nodes of one workload."""

    def __init__(self, read: ReadNode) -> None:
        """`read`: asks the API, and falls back to what was known."""
        self.read = read
        self.known: dict[str, Json] = {}
        self._asked: dict[str, float] = {}

    def of(self, pod: Json, *, again: bool = False) -> Json:
        """The pod's node; {} if it has none or it may not be read. `again`: not from memory, if that is old."""
        name = (pod.get("spec") or {}).get("nodeName")
        if not name:
            return {}
        old = time.monotonic() - self._asked.get(name, 0.0) > AGAIN_SECONDS
        if name not in self.known or (again and old):
            self._asked[name] = time.monotonic()
            self.known[name] = self.read(name, before=self.known.get(name))
        return self.known[name]
