"""Whether record, registry, server and archive say the same, and on request: make them.

Compared are the alias `champion`, the server's default version, the version that answers, the digest of the files that
its worker really loaded, the sha256 of the .mar in the store, and what is left over. The record is the truth; repairing
is the rollout's own `reconcile`. Not covered: whether the model is any good (the gate), the answers (check_endpoint).
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

from deployments.cluster_target import ClusterTarget
from deployments.errors import GiveUp, StepError
from deployments.serving import Served, TorchServe
from tasks.archive import content_digest
from tasks.champion import Champion
from tasks.endpoint import EndpointRecord, Version
from tasks.proof import Limits
from tasks.rollout import Rollout


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


def audit_endpoint(request: AuditRequest) -> Audit:
    """Compare, repair if asked. Raises TryAgain if a server is away or a rollout is under way."""
    record = EndpointRecord(folder=request.record, pipeline=request.pipeline)
    rollout = Rollout(
        TorchServe(request.management_url, request.inference_url),
        Champion(tracking_uri=request.tracking_uri, model=request.pipeline),
        record,
        Limits(),
    )
    with record.lock(request.lock_wait_seconds):
        serving = record.serving()
        findings = compare(rollout, serving)
        left, repaired = findings, False
        if findings and request.repair:
            repair(rollout, serving)
            left, repaired = compare(rollout, serving), True
    return Audit(
        pipeline=request.pipeline,
        version=serving.version if serving else "",
        label=serving.label if serving else "",
        sha256=serving.sha256 if serving else "",
        findings=findings,
        repaired=repaired,
        clean=not left,
    )


def repair(rollout: Rollout, serving: Version | None) -> None:
    """The record's state, by the rollout's own way back. Raises GiveUp where only a new package can help."""
    if serving:
        rollout.check_mar(serving)
    if served := next((found for found in rollout.versions() if serving and found.label == serving.label), None):
        content = content_digest(Path(serving.mar)) if serving else ""
        if digest_of(rollout, served)[1] not in (content, ""):
            raise GiveUp(
                f"{rollout.model} {served.label}: the server loaded other files than {served.mar} holds; restart it"
            )
    if unfinished := rollout.record.read()["transaction"]:
        rollout.finish(unfinished)
    else:
        rollout.reconcile()


def compare(rollout: Rollout, serving: Version | None) -> list[Finding]:
    """Everything that is not as the record says."""
    findings: list[Finding] = []

    def expect(what: str, found: object, expected: object) -> None:
        if found != expected:
            findings.append(Finding(what=what, found=str(found), expected=str(expected)))

    transaction = rollout.record.read()["transaction"]
    expect("unfinished transaction", transaction["phase"] if transaction else None, None)
    expect("alias champion", rollout.champion.read(), serving.version if serving else None)
    held = rollout.versions()
    default = next((found for found in held if found.default), None)
    expect("default version", default.label if default else None, serving.label if serving else None)
    expect("left over on the server", [v.label for v in held if not serving or v.label != serving.label], [])
    if serving is None:
        return findings
    mar = Path(serving.mar)
    if not mar.is_file():
        expect(f"sha256 of {mar.name}", "no such file", serving.sha256)
        return findings
    with mar.open("rb") as handle:
        expect(f"sha256 of {mar.name}", file_digest(handle, "sha256").hexdigest(), serving.sha256)
    if default:
        expect("workers ready", default.ready, default.workers)
        answering, loaded = digest_of(rollout, default)
        expect("label that answers", answering, serving.label)
        try:
            expect("digest of the served files", loaded, content_digest(mar))
        except GiveUp as error:
            expect("archive", str(error), "a valid one")
    return findings


def digest_of(rollout: Rollout, served: Served) -> tuple[str, str]:
    """(label, content digest) that a worker of this version reports; empty if none answers."""
    try:
        answer = rollout.server.predict(rollout.model, b"", label=served.label, timeout=10)
    except StepError:
        return "", ""
    return answer.headers.get("x-model-label", ""), answer.headers.get("x-content-digest", "")
