"""Whether record, registry, server and archive say the same, and on request: make them.

Compared are the alias `champion`, what the server has in service (TorchServe's default version; a cluster's Deployment,
field by field, and its pods), the version that answers, the digest of the files that its worker really loaded, the
sha256 of the .mar in the store, and what is left over. The record is the truth; repairing is the change's own
`reconcile`. Not covered: whether the model is any good (the gate), the answers (check_endpoint).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.cluster_target import ClusterTarget
from deployments.errors import GiveUp, StepError
from deployments.serving_manifests import LABEL_ANNOTATION
from tasks.archive import content_digest
from tasks.endpoint import Version
from tasks.endpoint_change import change_of
from tasks.proof import Limits
from tasks.rollout import Rollout
from tasks.transaction import check_mar, finish

if TYPE_CHECKING:
    from tasks.rolling_update import RollingUpdate


@dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """Which endpoint, and whether to repair it."""

    pipeline: str
    management_url: str = ""
    inference_url: str = ""
    tracking_uri: str
    record: str  # folder of the endpoints' records
    repair: bool = False
    lock_wait_seconds: float = 300.0
    cluster: ClusterTarget | None = None  # None: the TorchServe behind the URLs


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as the record says."""

    what: str
    found: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was compared and found. `clean` is about the state at the end: after a repair, if one was asked for."""

    pipeline: str
    version: str  # MLflow's; "" if nothing is in service
    label: str
    sha256: str
    findings: list[Finding]
    repaired: bool
    clean: bool


Compared = Iterator[tuple[str, object, object]]  # what, found, expected


def audit_endpoint(request: AuditRequest) -> Audit:
    """Compare, repair if asked. Raises TryAgain if a server is away or a rollout is under way."""
    change = change_of(request, Limits())
    with change.record.lock(request.lock_wait_seconds):
        serving = change.record.serving()
        findings = compare(change, serving)
        left, repaired = findings, False
        if findings and request.repair:
            repair(change, serving)
            left, repaired = compare(change, serving), True
    return Audit(
        pipeline=request.pipeline,
        version=serving.version if serving else "",
        label=serving.label if serving else "",
        sha256=serving.sha256 if serving else "",
        findings=findings,
        repaired=repaired,
        clean=not left,
    )


def repair(change: Rollout | RollingUpdate, serving: Version | None) -> None:
    """The record's state, by the change's own way back. Raises GiveUp where only a new package can help."""
    if serving:
        check_mar(change.model, serving)
        label, digest = answering(change, serving.label)
        if label == serving.label and digest not in (content_digest(Path(serving.mar)), ""):
            raise GiveUp(f"{change.model} {label}: the server loaded other files than {serving.mar} holds; restart it")
    if unfinished := change.record.read()["transaction"]:
        finish(change, unfinished)
    else:
        change.reconcile()


def compare(change: Rollout | RollingUpdate, serving: Version | None) -> list[Finding]:
    """Everything that is not as the record says."""
    return [
        Finding(what=what, found=str(found), expected=str(expected))
        for what, found, expected in everything(change, serving)
        if found != expected
    ]


def everything(change: Rollout | RollingUpdate, serving: Version | None) -> Compared:
    """All that is compared, whether it is as it should be or not."""
    transaction = change.record.read()["transaction"]
    yield "unfinished transaction", transaction["phase"] if transaction else None, None
    yield "alias champion", change.champion.read(), serving.version if serving else None
    served = yield from on_torchserve(change, serving) if isinstance(change, Rollout) else in_pods(change, serving)
    if serving is None:
        return
    mar = Path(serving.mar)
    if not mar.is_file():
        yield f"sha256 of {mar.name}", "no such file", serving.sha256
        return
    with mar.open("rb") as handle:
        yield f"sha256 of {mar.name}", file_digest(handle, "sha256").hexdigest(), serving.sha256
    if served:
        label, loaded = answering(change, served)
        yield "label that answers", label, serving.label
        try:
            yield "digest of the served files", loaded, content_digest(mar)
        except GiveUp as error:
            yield "archive", str(error), "a valid one"


def on_torchserve(rollout: Rollout, serving: Version | None) -> Generator[tuple[str, object, object], None, str]:
    """What one TorchServe holds; returns the label of its default version, "" if it has none."""
    held = rollout.versions()
    default = next((found for found in held if found.default), None)
    yield "default version", default.label if default else None, serving.label if serving else None
    yield "left over on the server", [v.label for v in held if not serving or v.label != serving.label], []
    if serving and default:
        yield "workers ready", default.ready, default.workers
    return default.label if default else ""


def in_pods(update: RollingUpdate, serving: Version | None) -> Generator[tuple[str, object, object], None, str]:
    """What a cluster has; returns the label of its Deployment, "" if there is none."""
    live = update.rollouts.find(update.name)
    template = live["spec"]["template"]["metadata"] if live else {}
    label = str((template.get("annotations") or {}).get(LABEL_ANNOTATION, ""))
    yield f"Deployment {update.name}", label or None, serving.label if serving else None
    if serving is None or live is None:
        return ""
    for item in update.objects(serving):
        yield f"{item['kind']} {update.name} differs in", ", ".join(update.rollouts.drift(item)), ""
    state = update.rollouts.state(update.name)
    yield "pods", "all ready" if state.complete else state.reason, "all ready"
    return label


def answering(change: Rollout | RollingUpdate, label: str) -> tuple[str, str]:
    """(label, content digest) that a worker reports, of this version where versions can be told apart in a request;
    empty if none answers."""
    pinned = label if isinstance(change, Rollout) else ""
    try:
        answer = change.server.predict(change.model, b"", label=pinned, timeout=10)
    except StepError:
        return "", ""
    return answer.headers.get("x-model-label", ""), answer.headers.get("x-content-digest", "")
