"""The preflight: would these workloads run on that cluster, and what mends it if not; before anything is created.

    findings = preflight(take(api, place), [workload], place)
    refuse(findings)                                            # PreflightError, exit code 3, if one is FAIL

Pure: a snapshot and manifests go in, rows come out. FAIL: it cannot run, however long one waits. WARN: it runs, and
something will cost it (a wait, its checkpoint, its reproducibility). Each look is a file of its own, preflight_*.py.
Not covered: taking the snapshot (snapshot_take.py), pods that hang in spite of it (pod_diagnosis.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deployments.cluster_place import ClusterPlace
from deployments.errors import PreflightError, StepError
from deployments.manifests import manifest
from deployments.preflight_access import (
    look_at_definitions,
    look_at_rights,
    look_at_server,
    look_at_what_was_not_seen,
)
from deployments.preflight_findings import Case, Finding, merged, wanted
from deployments.preflight_pods import (
    look_at_disruption,
    look_at_graces,
    look_at_images,
    look_at_references,
    look_at_restarts,
)
from deployments.preflight_quota import look_at_limit_ranges, look_at_quotas
from deployments.preflight_scheduling import look_at_places
from deployments.preflight_security import look_at_security
from deployments.preflight_services import look_at_dvc, look_at_mlflow
from deployments.preflight_storage import look_at_claims, look_at_shm
from deployments.snapshot import Snapshot
from deployments.workload import Workload

LOOKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    look_at_server,
    look_at_definitions,
    look_at_rights,
    look_at_what_was_not_seen,
    look_at_security,
    look_at_places,
    look_at_quotas,
    look_at_limit_ranges,
    look_at_claims,
    look_at_shm,
    look_at_graces,
    look_at_disruption,
    look_at_restarts,
    look_at_images,
    look_at_references,
    look_at_mlflow,
    look_at_dvc,
)


def preflight(
    snapshot: Snapshot,
    workloads: Sequence[Workload | Mapping[str, Any]],
    place: ClusterPlace,
    *,
    save_seconds: float | None = None,
) -> list[Finding]:
    """Look at workloads (or their manifests) on a cluster. Never raises for what it finds.

    `save_seconds`: how long a checkpoint takes, if earlier attempts measured it.
    """
    pairs: list[tuple[Case, Case | None]] = []
    findings: list[Finding] = []
    for workload in workloads:
        if not isinstance(workload, Workload):
            pairs.append((case_of(workload, snapshot, place, save_seconds), None))
            continue
        try:
            made, other = manifest(workload, place), otherwise(workload, place)
        except StepError as error:
            fix = "correct it in cluster.toml or pipeline.toml"
            findings.append(Finding(what="manifest", verdict="FAIL", found=f"{workload.name}: {error}", fix=fix))
            continue
        second = case_of(other, snapshot, place) if other is not None else None
        pairs.append((case_of(made, snapshot, place, save_seconds), second))
    trains = any(case.wanted.is_training for case, _ in pairs)
    for case, second in pairs:
        for look in LOOKS:
            found = list(look(replace(case, trains=trains)))
            if look is look_at_places and second is not None and not failures(look(second)):
                found = [_waits(f) if f.verdict == "FAIL" else f for f in found]
            findings += found
    return list(merged(findings))


def _waits(finding: Finding) -> Finding:
    then = "the other capacity (spot, on-demand) is asked for when it has waited"
    return replace(finding, verdict="WARN", found=f"{finding.found}; {then}")


def otherwise(workload: Workload, place: ClusterPlace) -> Mapping[str, Any] | None:
    """What is asked for after a while if this finds no place: the same on the other capacity; None if it waits on."""
    if workload.image != "train" or workload.start_seconds is None:
        return None
    return manifest(replace(workload, spot=not workload.spot), place)


def case_of(
    made: Mapping[str, Any], snapshot: Snapshot, place: ClusterPlace, save_seconds: float | None = None
) -> Case:
    """What every look is given about one manifest."""
    return Case(
        wanted=wanted(made),
        snapshot=snapshot,
        queue=place.queue,
        autoscaler=place.autoscaler,
        save_seconds=save_seconds,
    )


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """The rows that refuse."""
    return [f for f in findings if f.verdict == "FAIL"]


def refuse(findings: Iterable[Finding]) -> None:
    """Raise PreflightError (exit code 3) that names every FAIL and its fix; nothing if there is none."""
    if failed := failures(findings):
        lines = [f"{f.what}: {f.found}; fix: {f.fix}" for f in failed]
        raise PreflightError("this cluster cannot run it: " + "\n  ".join(lines))
