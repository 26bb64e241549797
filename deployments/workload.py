"""What is run and what came of it: the vocabulary between tasks and places.

A `Workload` says what to run and what it needs; a `Runner` (laptop, cluster) runs it and answers with an `Outcome`.
Standard library only, because every step imports it. Not covered: how a place does it (laptop.py, cluster.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Image = Literal["flow", "step", "train", "serve"]
Account = Literal["", "deploy"]
Cause = Literal[
    "complete",  # exit 0
    "spot",  # the platform took the node, with notice (SIGTERM) or without (SIGKILL)
    "consolidation",  # the platform moved the pod to save money
    "node_lost",  # the node vanished
    "out_of_memory",
    "user_error",  # exit 1..127: a bug, spends the error budget
    "cancelled",  # somebody asked for it
    "deadline",  # the workload's own wall-clock limit
    "no_capacity",  # it never got a node within start_seconds: neither an error nor an interruption
]
INTERRUPTIONS: frozenset[str] = frozenset({"spot", "consolidation", "node_lost"})


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one replica asks for."""

    cpus: float = 1.0
    memory: str = "1Gi"  # Kubernetes quantity
    gpus: int = 0
    gpu_resource: str = "nvidia.com/gpu"  # or a MIG slice: nvidia.com/mig-1g.10gb
    shm: str = ""  # size of /dev/shm, Kubernetes quantity; empty: the container runtime's 64Mi


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One thing to run to its end. The same name is the same run of it: a Runner adopts, never duplicates."""

    name: str  # a DNS label made from the step key (and attempt): the identity
    image: Image
    command: tuple[str, ...]  # argv; "python" stands for the place's interpreter
    request: Mapping[str, Any] = field(default_factory=dict)  # request.json; its path replaces {request} in argv
    env: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = Resources()
    replicas: int = 1  # nodes
    processes: int = 1  # per node, as torchrun's --nproc-per-node
    spot: bool = False  # may be interrupted
    grace_seconds: float = 30.0  # between SIGTERM and SIGKILL
    deadline_seconds: float | None = None  # wall clock
    start_seconds: float | None = None  # how long it may wait for a node; None: for ever
    labels: Mapping[str, str] = field(default_factory=dict)  # run, pipeline, step
    account: Account = ""  # "deploy": on a cluster it may change what is served; else it may ask the API nothing


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a workload ended. `result` is what the program wrote to {result}, if it did."""

    name: str
    exit_code: int | None  # as a shell tells it: 128+N for signal N; None when it is not known
    cause: Cause
    reason: str  # one sentence for a person
    started: float  # unix seconds
    ended: float
    result: dict[str, Any] | None = None
    adopted: bool = False  # it was already running or finished when we asked
    notice: float | None = None  # unix seconds at which the interruption was announced
    node: str = ""
    capacity: str = ""  # spot | on-demand
    log: str = ""  # where the log is kept: a path or a URL


class Runner(Protocol):
    """A place that runs workloads."""

    place: str

    def run(self, workload: Workload, *, on_line: Callable[[str], None] | None = None) -> Outcome:
        """Create or adopt `workload.name`, wait for its end. `on_line` gets each line of its log as it comes."""

    def stop(self, name: str, *, grace_seconds: float | None = None) -> None:
        """End it: SIGTERM, then SIGKILL for the whole tree after the grace. No error if it is not there."""

    def logs(self, name: str, *, follow: bool = False) -> Iterator[str]:
        """Lines of its log so far, and with `follow` those to come until it ends."""
