"""A packaged version into service, or an earlier one back: alias, what is served and .mar digest in one transaction.

    python -m tasks.step deploy_model request.json result.json

Running it again is always right: after a kill it continues or undoes what was under way, and a version that is in
service already is verified, not deployed again. On any failure the old version serves on, the new one is removed, the
alias is as before, and the error says why. With `cluster` the version goes to pods of it, else to a TorchServe.
Not covered: the order itself (tasks.transaction, tasks.rollout, tasks.rolling_update), its record (tasks.endpoint).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from deployments.cluster_target import ClusterTarget
from deployments.errors import GiveUp
from tasks.admission import AdmissionRequest, admit
from tasks.endpoint import EndpointRecord, Version
from tasks.endpoint_change import change_of, inference_url
from tasks.proof import Limits
from tasks.transaction import Change, in_service, move, verify


@dataclass(frozen=True, kw_only=True)
class DeployRequest:
    """What to put into service, and what it has to keep to. Seconds; paths absolute."""

    key: str
    pipeline: str
    version: str  # MLflow's
    label: str  # TorchServe's, from package_model
    mar: str
    sha256: str
    management_url: str = ""  # TorchServe's; not used on a cluster
    inference_url: str = ""  # on a cluster empty: the Service's name
    serve: dict[str, Any] = field(default_factory=dict)
    golden: str  # heldout.jsonl
    golden_count: int = 20
    soak_seconds: float = 1.0
    tracking_uri: str
    record: str  # folder of the endpoints' records: <store>/endpoints
    tolerance: float = 1e-4
    start_seconds: float = 120.0
    max_p95_seconds: float = 1.0
    canary_samples: int = 0  # held-out samples on which old and new are compared; 0: none
    canary_max_accuracy_drop: float = 0.05
    # Serve it on scratch ports first (tasks.admission); about ten seconds, once per archive. On a cluster each new pod
    # proves itself before it gets traffic, so nothing is asked of the step's own machine.
    admission: bool = False
    server_logs: str = ""  # TorchServe's log folder, if it is here: a worker that does not start is then quoted
    lock_wait_seconds: float = 300.0
    cluster: ClusterTarget | None = None  # None: the TorchServe behind the URLs


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """What is in service now."""

    url: str
    version: str
    label: str
    sha256: str
    previous: str | None  # MLflow version that served before, or None
    seconds: float
    golden_passed: int
    changed: bool  # False: it was in service already


@dataclass(frozen=True, kw_only=True)
class RollbackRequest:
    """Back to an earlier version: `to` is an MLflow version or a label; empty is the one before."""

    pipeline: str
    to: str = ""
    management_url: str = ""
    inference_url: str = ""
    tracking_uri: str
    record: str
    soak_seconds: float = 1.0
    lock_wait_seconds: float = 300.0
    cluster: ClusterTarget | None = None


def deploy_model(request: DeployRequest) -> Endpoint:
    """Put the version into service. Raises GiveUp (refused, and all is as before) or TryAgain (a server is away)."""
    return run(request, lambda phase: None)


def run(request: DeployRequest, on_phase: Callable[[str], None]) -> Endpoint:
    """`deploy_model`, telling every transition."""
    record = EndpointRecord(folder=request.record, pipeline=request.pipeline)
    target = Version(
        version=request.version,
        label=request.label,
        mar=request.mar,
        sha256=request.sha256,
        golden=record.keep_golden(request.label, request.golden),
        key=request.key,
        golden_count=request.golden_count,
        tolerance=request.tolerance,
        serve=request.serve,
        cluster=asdict(request.cluster.without_access()) if request.cluster else {},
    )
    limits = Limits(
        start_seconds=request.start_seconds,
        soak_seconds=request.soak_seconds,
        max_p95_seconds=request.max_p95_seconds,
        canary_samples=request.canary_samples,
        max_accuracy_drop=request.canary_max_accuracy_drop,
        request_seconds=float(request.serve.get("response_timeout_seconds", 30)) + 1,
        server_logs=request.server_logs,
    )
    change = change_of(request, limits, on_phase)
    with undone_when_cancelled():
        return put_into_service("deploy", change, target, request)


def roll_back(request: RollbackRequest, on_phase: Callable[[str], None] = lambda phase: None) -> Endpoint:
    """An earlier version back in service, by the same transaction. Raises GiveUp if there is none, or as deploying."""
    change = change_of(request, Limits(soak_seconds=request.soak_seconds), on_phase)
    record = change.record
    if request.to:
        target = record.find(request.to)
    elif (before := record.previous()) is not None:
        target = before
    else:
        raise GiveUp(
            f"{request.pipeline}: no version was in service before this one, so there is nothing to go back to"
        )
    return put_into_service("rollback", change, target, request)


@contextmanager
def undone_when_cancelled() -> Iterator[None]:
    """SIGTERM becomes an exception, so that a cancelled rollout is undone within its grace and not by the next one."""
    if threading.current_thread() is not threading.main_thread():  # only there can a signal be handled
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not end the undoing
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def put_into_service(kind: str, change: Change, target: Version, request: DeployRequest | RollbackRequest) -> Endpoint:
    """Under the endpoint's lock: verify what is in service already, or move."""
    began = time.monotonic()
    with change.record.lock(request.lock_wait_seconds):
        changed = not in_service(change, target)
        if changed and isinstance(request, DeployRequest) and request.admission and request.cluster is None:
            admit(admission_of(request))
            change.on_phase("admitted")
        passed = move(change, kind, target) if changed else verify(change, target)
        old = change.record.previous()
    return Endpoint(
        url=f"{inference_url(request)}/predictions/{request.pipeline}",
        version=target.version,
        label=target.label,
        sha256=target.sha256,
        previous=old.version if old else None,
        seconds=round(time.monotonic() - began, 3),
        golden_passed=passed,
        changed=changed,
    )


def admission_of(request: DeployRequest) -> AdmissionRequest:
    """The admission test of what is to be deployed."""
    return AdmissionRequest(
        pipeline=request.pipeline,
        version=request.version,
        label=request.label,
        mar=request.mar,
        sha256=request.sha256,
        golden=request.golden,
        golden_count=request.golden_count,
        tolerance=request.tolerance,
        workers=int(request.serve.get("workers", 1)),
        start_seconds=request.start_seconds,
        store=str(EndpointRecord(folder=request.record, pipeline=request.pipeline).store.path),
    )
