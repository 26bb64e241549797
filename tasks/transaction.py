"""One change of what an endpoint serves, as a transaction: the order, the record and the undoing, whatever the server.

`move` notes each phase before its effect and commits by one write. Whatever fails or kills it, `reconcile` makes server
and registry equal the record again: before the commit that is the old version, after it the new one. So a repeated
deployment needs no special case. What a server has to be able to do is `Change`; there are two, tasks.rollout
(versions beside each other on one TorchServe) and tasks.rolling_update (pods of a cluster, one version each).
Not covered: locks and requests (tasks.deploy_model), what a right answer is (tasks.proof).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from deployments.errors import GiveUp, StepError, TryAgain
from tasks.archive import validate_archive
from tasks.champion import Champion
from tasks.endpoint import EndpointRecord, Version
from tasks.golden import read_golden
from tasks.proof import Limits, Proof


class Change(Protocol):
    """How versions of one pipeline are moved on one kind of server. `on_phase` hears of every transition."""

    champion: Champion
    record: EndpointRecord
    limits: Limits
    on_phase: Callable[[str], None]

    def proof(self, target: Version, samples: int) -> Proof:
        """What the target has to answer. Raises GiveUp if its archive or its golden answers are damaged."""

    def prove_and_switch(self, target: Version, proof: Proof) -> int:
        """From the first effect to the commit (`commit` below); returns the number of right golden answers."""

    def restore(self) -> None:
        """A server that lost the version in service gets it before anything else, where that helps."""

    def reconcile(self) -> None:
        """Make server and alias equal the record, with nothing left over. Raises TryAgain if they are not yet."""

    def holds(self, target: Version) -> bool:
        """Whether the server has this version in service, healthy and alone."""


def move(change: Change, kind: str, target: Version) -> int:
    """Put `target` into service; returns the number of golden requests it answered. Raises GiveUp or TryAgain after
    everything is as before."""
    record = change.record
    proof = change.proof(target, max(target.golden_count, change.limits.canary_samples))
    unfinished = record.read()["transaction"]
    if unfinished and (
        unfinished["phase"] in ("committed", "undoing") or unfinished["target"]["label"] != target.label
    ):
        finish(change, unfinished)
    change.restore()
    record.begin(kind, target, change.champion.read())
    change.on_phase("begun")
    try:
        passed = change.prove_and_switch(target, proof)
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"
        try:
            record.phase("undoing", why=why)
            change.on_phase("undoing")
            change.reconcile()
            record.close("rolled back", why)
        except StepError as worse:
            raise TryAgain(f"{error}; and the old version could not be restored yet: {worse}") from error
        raise
    change.on_phase("committed")
    change.reconcile()  # the old one is drained and removed
    change.on_phase("drained")
    record.close("in service", golden=passed)
    return passed


def note(change: Change, phase: str) -> None:
    """Record the phase that comes next, before its effect."""
    change.record.phase(phase)
    change.on_phase(phase)


def commit(change: Change, target: Version) -> None:
    """Alias, then the one write that decides it. Raises TryAgain if somebody else moves the alias."""
    note(change, "aliasing")
    change.champion.move(target.version)
    change.on_phase("aliased")
    if (found := change.champion.read()) != target.version:
        raise TryAgain(
            f"alias {change.champion.alias!r} was set to {target.version} and is {found}: somebody else moves it"
        )
    change.record.commit(target)


def finish(change: Change, unfinished: dict[str, Any]) -> None:
    """End a transaction that a kill left: forward if it was committed, else back."""
    committed = unfinished["phase"] == "committed"
    change.reconcile()
    change.record.close("in service" if committed else "rolled back", unfinished.get("why") or "the process was killed")


def in_service(change: Change, target: Version) -> bool:
    """Whether record, server and alias all name the target, with nothing under way and nothing left over."""
    serving = change.record.serving()
    if serving is None or (serving.label, serving.sha256) != (target.label, target.sha256):
        return False
    if not change.holds(target) or change.record.read()["transaction"] is not None:
        return False
    return change.champion.read() == target.version


def verify(change: Change, target: Version) -> int:
    """Golden requests to what is in service. Raises GiveUp if it answers wrongly."""
    return change.proof(target, target.golden_count).prove(pinned=False)


def proof_of(change: Change, server: Any, target: Version, samples: int) -> Proof:
    """A proof whose expected digest is that of the archive in the store. Raises GiveUp as `check_mar`."""
    model = change.record.pipeline
    return Proof(
        server=server,
        model=model,
        target=target,
        content=check_mar(model, target),
        golden=read_golden(target.golden, samples),
        limits=change.limits,
    )


def check_mar(model: str, target: Version) -> str:
    """The archive is the one that was packaged, and harmless; returns its content digest. Raises GiveUp."""
    from hashlib import file_digest

    path = Path(target.mar)
    if not path.is_file():
        raise GiveUp(f"{path} is missing from the model store; package it again")
    with path.open("rb") as handle:
        found = file_digest(handle, "sha256").hexdigest()
    if found != target.sha256:
        raise GiveUp(f"{path} has sha256 {found}, packaged was {target.sha256}; package it again")
    return validate_archive(path, pipeline=model, label=target.label).content_digest
