"""The preflight's questions to the API server itself: version, clock, definitions, the operator, rights.

`RIGHTS` is the one list of what Reprise asks of the API; a Role is printed from it. Pure.
Not covered: what pods may do (deployments/k8s/base/accounts.yaml).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deployments.kube_api import INSTALL_OPERATOR
from deployments.preflight_findings import Case, Finding, Json

OLDEST = (1, 29)  # podReplacementPolicy is on from there; older servers drop it, and two pods of a step may run


@dataclass(frozen=True, kw_only=True)
class Right:
    """One verb on one resource that Reprise uses."""

    group: str
    resource: str
    verb: str
    subresource: str = ""
    cluster_wide: bool = False
    why: str = ""
    needed: bool = True  # otherwise something is told with less detail

    @property
    def full(self) -> str:
        """The resource as a Role names it."""
        return f"{self.resource}/{self.subresource}" if self.subresource else self.resource


def _rights(group: str, resource: str, verbs: str) -> list[Right]:
    return [Right(group=group, resource=resource, verb=verb) for verb in verbs.split()]


RIGHTS: tuple[Right, ...] = (
    *_rights("batch", "jobs", "get list watch create patch delete"),
    *_rights("kubeflow.org", "pytorchjobs", "get list watch create patch delete"),
    *_rights("", "pods", "get list watch delete"),
    Right(group="", resource="pods", subresource="log", verb="get"),
    Right(group="", resource="events", verb="list", needed=False, why="a pod that hangs is explained with less detail"),
    Right(
        group="",
        resource="nodes",
        verb="get",
        cluster_wide=True,
        needed=False,
        why="a spot interruption cannot be told from another loss of a node",
    ),
    Right(
        group="",
        resource="nodes",
        verb="list",
        cluster_wide=True,
        needed=False,
        why="a job that no node could ever take is not refused before it is made",
    ),
)


def role(rights: Sequence[Right], namespace: str) -> str:
    """The rules that are missing, as one line that a Role takes."""
    rules: dict[tuple[str, str], list[str]] = {}
    for right in rights:
        rules.setdefault((right.group, right.full), []).append(right.verb)
    lines = [{"apiGroups": [g], "resources": [r], "verbs": verbs} for (g, r), verbs in rules.items()]
    kind = "ClusterRole" if all(r.cluster_wide for r in rights) else f"Role in namespace {namespace}"
    return f"add to the {kind}: rules: {json.dumps(lines)}"


def look_at_server(case: Case) -> Iterator[Finding]:
    """Version and clock."""
    snapshot = case.snapshot
    found = re.match(r"v?(\d+)\.(\d+)", snapshot.version)
    if found:
        old = (int(found[1]), int(found[2])) < OLDEST
        yield Finding(
            what="server version",
            verdict="WARN" if old else "OK",
            found=snapshot.version,
            fix=f"upgrade to {OLDEST[0]}.{OLDEST[1]} or later: older servers drop podReplacementPolicy of a Job, "
            "and two "
            "pods of a step may run at once"
            if old
            else "",
        )
    if (offset := snapshot.clock_offset) is not None:
        ahead = f"{abs(offset):.0f} s {'behind' if offset > 0 else 'ahead of'} the API server's"
        bad = abs(offset) > 5
        yield Finding(
            what="clock",
            verdict="FAIL" if abs(offset) > 240 else "WARN" if bad else "OK",
            found=f"this machine's clock is {ahead}" if bad else "agrees with the API server's",
            fix="set the clock (timedatectl set-ntp true): tokens and S3 signatures are refused, deadlines and lost "
            "time are counted wrong"
            if bad
            else "",
        )


def look_at_definitions(case: Case) -> Iterator[Finding]:
    """PyTorchJob is defined in the version that is used, and somebody acts on it."""
    if not case.wanted.is_training:
        return
    apis, what = case.snapshot.apis, "PyTorchJob"
    versions = sorted(
        v.partition("/")[2] for v, names in apis.items() if v.startswith("kubeflow.org/") and "pytorchjobs" in names
    )
    v2 = sorted(v for v, names in apis.items() if v.startswith("trainer.kubeflow.org/") and "trainjobs" in names)
    if "v1" not in versions:
        if versions:
            found = f"pytorchjobs.kubeflow.org in {', '.join(versions)} only; v1 is used"
            fix = f"upgrade the Training Operator to 1.9: {INSTALL_OPERATOR}"
        elif v2:
            found = (
                f"only Kubeflow Trainer v2 is installed (TrainJob, {v2[0]}); it has no PyTorchJob and no elastic jobs"
            )
            fix = f"install the Training Operator v1 beside it, the two do not disturb each other: {INSTALL_OPERATOR}"
        else:
            found, fix = "pytorchjobs.kubeflow.org is not defined here", f"install the operator: {INSTALL_OPERATOR}"
        yield Finding(what=what, verdict="FAIL", found=found, fix=fix)
        return
    down = list(look_at_operator(case))
    yield from down
    if not down:
        yield Finding(what=what, verdict="OK", found="kubeflow.org/v1")


def look_at_operator(case: Case) -> Iterator[Finding]:
    """Somebody acts on PyTorchJobs, as far as it can be seen."""
    operators = case.snapshot.get("operators") if case.wanted.is_training else []
    if operators and not any((o.get("status") or {}).get("availableReplicas") for o in operators):
        name, namespace = operators[0]["metadata"]["name"], operators[0]["metadata"].get("namespace", "")
        yield Finding(
            what="PyTorchJob",
            verdict="FAIL",
            found=f"it is defined, but its operator (deployment {namespace}/{name}) has no replica available",
            fix=f"kubectl -n {namespace} describe deployment {name}; without it a job gets no pods and no word why",
        )


def look_at_rights(case: Case) -> Iterator[Finding]:
    """Every verb that is used is allowed to whoever asked."""
    answers = {(a["group"], a["resource"], a["verb"]): bool(a["allowed"]) for a in case.snapshot.access}
    missing = [r for r in RIGHTS if answers.get((r.group, r.full, r.verb)) is False]
    if not case.trains:
        missing = [r for r in missing if r.group != "kubeflow.org"]
    if needed := [r for r in missing if r.needed]:
        verbs: dict[str, list[str]] = {}
        for right in needed:
            verbs.setdefault(right.full, []).append(right.verb)
        found = "; ".join(f"{', '.join(names)} {resource}" for resource, names in verbs.items())
        yield Finding(
            what="rights", verdict="FAIL", found=f"not allowed: {found}", fix=role(needed, case.snapshot.namespace)
        )
    for wide in (False, True):
        if lacking := [r for r in missing if not r.needed and r.cluster_wide == wide]:
            yield Finding(
                what="rights",
                verdict="WARN",
                found="; ".join(f"not allowed: {r.verb} {r.full}: {r.why}" for r in lacking),
                fix=role(lacking, case.snapshot.namespace),
            )
    if not missing and answers:
        yield Finding(what="rights", verdict="OK", found=f"all {len(answers)} that are used")
    if why := case.snapshot.unreadable.get("access"):
        yield Finding(
            what="rights",
            verdict="WARN",
            found=f"not looked at: {why}",
            fix="every account may ask that by default: bind system:basic-user again",
        )


def look_at_what_was_not_seen(case: Case) -> Iterator[Finding]:
    """What could not be read cannot be judged: said once, with the rule."""
    scopes = {"nodes": True, "pods": True, "persistentvolumes": True, "nodepools": True, "storageclasses": True}
    groups = {"nodepools": "karpenter.sh", "storageclasses": "storage.k8s.io"}
    listed: tuple[str, ...] = ("nodes", "pods", "resourcequotas", "limitranges", "persistentvolumeclaims", "nodepools")
    unreadable = case.snapshot.unreadable
    if (pools := unreadable.get("nodepools", "")).startswith("karpenter.sh is there"):
        yield Finding(
            what="what can be seen",
            verdict="WARN",
            found=f"NodePools are not judged: {pools}",
            fix="upgrade Karpenter to 1.0 or later",
        )
        listed = listed[:-1]
    if blind := [plural for plural in listed if plural in unreadable]:
        rules: dict[str, list[str]] = {}
        for plural in blind:
            rules.setdefault(groups.get(plural, ""), []).append(plural)
        told = [{"apiGroups": [g], "resources": names, "verbs": ["list"]} for g, names in rules.items()]
        kind = "ClusterRole" if any(scopes.get(p) for p in blind) else "Role"
        yield Finding(
            what="what can be seen",
            verdict="WARN",
            found=f"not judged, because they may not be listed: {', '.join(blind)}",
            fix=f"add to the {kind}: rules: {json.dumps(told)}",
        )


def labels_of(item: Json) -> Json:
    """The labels of an object."""
    return item["metadata"].get("labels") or {}
