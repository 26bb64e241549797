"""ResourceQuota and LimitRange against the pods of a workload. Pure.

The quota that is full now is a WARN (it empties), one that is too small for ever a FAIL. Defaults of limit ranges are
applied first, as the API server does. Not covered: ClusterResourceQuota, Kueue's quotas beyond the queue's existence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from deployments.kube_quantity import milli, shown
from deployments.labels import WORKLOAD_LABEL
from deployments.preflight_findings import Case, Finding, Json, PodSet, is_device

COMPUTE = ("cpu", "memory", "ephemeral-storage")


def look_at_quotas(case: Case) -> Iterator[Finding]:
    """Room in every quota of the namespace."""
    if any(
        (p["metadata"].get("labels") or {}).get(WORKLOAD_LABEL) == case.wanted.name for p in case.snapshot.get("pods")
    ):
        return  # it runs already, and is in the counts
    quotas, well = case.snapshot.get("resourcequotas"), True
    for quota in quotas:
        sets = [p for p in case.wanted.sets if _in_scope(quota, case, p)]
        wanted = _demand(case, sets)
        status = quota.get("status") or {}
        hard = status.get("hard") or (quota.get("spec") or {}).get("hard") or {}
        for resource, limit in sorted(hard.items()):
            for finding in _one(case, quota["metadata"]["name"], resource, limit, wanted, status):
                well = False
                yield finding
        for finding in _needs_limits(case, quota["metadata"]["name"], hard, sets):
            well = False
            yield finding
    if quotas and well:
        yield Finding(what="quota", verdict="OK", found=f"{case.wanted.label} fits into {len(quotas)} quota(s)")


def _one(case: Case, name: str, resource: str, limit: str, wanted: Counter[str], status: Json) -> Iterator[Finding]:
    asked, total = wanted.get(_plain(resource), 0), milli(limit)
    taken = milli((status.get("used") or {}).get(resource, "0"))
    if not asked or asked <= total - taken:
        return
    here = f"kubectl -n {case.wanted.namespace} edit resourcequota {name}"
    numbers = f"{shown(resource, asked)} {resource}, ResourceQuota {name} allows {shown(resource, total)}"
    if asked > total:
        yield Finding(
            what="quota",
            verdict="FAIL",
            found=f"{case.wanted.label} asks for {numbers} in all",
            fix=f"raise its {resource} ({here}), or ask for less in [resources] of cluster.toml",
        )
    else:
        yield Finding(
            what="quota",
            verdict="WARN",
            found=f"{case.wanted.label} asks for {numbers} and {shown(resource, taken)} are used",
            fix=f"no pod is created until others have ended; or raise its {resource}: {here}",
        )


def _plain(resource: str) -> str:
    """`cpu` and `memory` in a quota mean requests."""
    return f"requests.{resource}" if resource in COMPUTE else resource


def _in_scope(quota: Json, case: Case, pods: PodSet) -> bool:
    spec = quota.get("spec") or {}
    terminating = "activeDeadlineSeconds" in pods.spec
    scopes = {"Terminating": terminating, "NotTerminating": not terminating, "BestEffort": False, "NotBestEffort": True}
    if any(not scopes.get(scope, True) for scope in spec.get("scopes") or ()):
        return False
    for expression in (spec.get("scopeSelector") or {}).get("matchExpressions") or ():
        if expression.get("scopeName") == "PriorityClass":
            mine, values = pods.spec.get("priorityClassName") or "", expression.get("values") or []
            holds = {"In": mine in values, "NotIn": mine not in values, "Exists": bool(mine), "DoesNotExist": not mine}
            if not holds.get(expression.get("operator", "Exists"), True):
                return False
        elif not scopes.get(expression.get("scopeName", ""), True):
            return False
    return True


def _demand(case: Case, sets: list[PodSet]) -> Counter[str]:
    total: Counter[str] = Counter()
    for pods in sets:
        for resource, value in pods.requests.items():
            if resource != "pods":
                total[f"requests.{resource}"] += value * pods.count
        for resource, value in _limits(case, pods).items():
            total[f"limits.{resource}"] += value * pods.count
        total["pods"] += 1000 * pods.count
        total["count/pods"] += 1000 * pods.count
        if case.wanted.is_training:  # the operator makes a Service for every pod
            total["services"] += 1000 * pods.count
            total["count/services"] += 1000 * pods.count
    total["count/pytorchjobs.kubeflow.org" if case.wanted.is_training else "count/jobs.batch"] += 1000
    return total


def _limits(case: Case, pods: PodSet) -> Counter[str]:
    total: Counter[str] = Counter()
    for container in pods.containers:
        for resource, value in _effective(case, container)["limits"].items():
            total[resource] += milli(value)
    return total


def _needs_limits(case: Case, name: str, hard: Json, sets: list[PodSet]) -> Iterator[Finding]:
    """A quota on limits.cpu refuses every container without a CPU limit, and Reprise sets none."""
    for resource in COMPUTE:
        if f"limits.{resource}" not in hard:
            continue
        if any(resource not in _effective(case, c)["limits"] for p in sets for c in p.containers):
            yield Finding(
                what="quota",
                verdict="FAIL",
                found=f"ResourceQuota {name} counts limits.{resource}, so that pods without such a limit are "
                "refused, and "
                f"{case.wanted.label} sets none",
                fix=f"count requests.{resource} in the quota instead, or give the namespace a LimitRange with a "
                "default "
                f"{resource} limit",
            )


def look_at_limit_ranges(case: Case) -> Iterator[Finding]:
    """Every container and pod within the limit ranges of the namespace."""
    ranges, well = case.snapshot.get("limitranges"), True
    for item in ranges:
        for bounds in (item.get("spec") or {}).get("limits") or ():
            for pods in case.wanted.sets:
                for found in _bounds(case, item["metadata"]["name"], bounds, pods):
                    well = False
                    yield found
    for pods in case.wanted.sets:
        for found in _request_over_limit(case, pods):
            well = False
            yield found
    if ranges and well:
        yield Finding(
            what="limit range", verdict="OK", found=f"{case.wanted.label} keeps to {len(ranges)} limit range(s)"
        )


def _bounds(case: Case, name: str, bounds: Json, pods: PodSet) -> Iterator[Finding]:
    kind = bounds.get("type")
    if kind == "Container":
        subjects: list[tuple[str, Json]] = [(f"container {c['name']}", _effective(case, c)) for c in pods.containers]
    elif kind == "Pod":
        requests = {r: v for r, v in pods.requests.items() if r != "pods"}
        subjects = [("a pod", {"requests": requests, "limits": dict(_limits(case, pods))})]
    else:
        return
    for subject, has in subjects:
        for side, resource, bound, ask in _broken(bounds, has):
            word, direction = ("at most", "less") if side == "max" else ("at least", "more")
            yield Finding(
                what="limit range",
                verdict="FAIL",
                found=f"{case.wanted.label}: {subject} has {ask} {resource}, LimitRange {name} wants {word} {bound}",
                fix=f"ask for {direction} in [resources] of cluster.toml, or change it: kubectl -n "
                f"{case.wanted.namespace} "
                f"edit limitrange {name}",
            )


def _broken(bounds: Json, has: Json) -> Iterator[tuple[str, str, str, str]]:
    for resource, bound in (bounds.get("max") or {}).items():
        value = has["limits"].get(resource, has["requests"].get(resource))
        if value is not None and _amount(value) > milli(bound):
            yield "max", resource, bound, shown(resource, _amount(value))
    for resource, bound in (bounds.get("min") or {}).items():
        value = has["requests"].get(resource)
        if value is not None and _amount(value) < milli(bound):
            yield "min", resource, bound, shown(resource, _amount(value))


def _amount(value: str | int) -> int:
    return value if isinstance(value, int) else milli(value)


def _request_over_limit(case: Case, pods: PodSet) -> Iterator[Finding]:
    """A default limit that is below what is asked for makes the pod invalid."""
    for container in pods.containers:
        has, own = _effective(case, container), (container.get("resources") or {}).get("limits") or {}
        for resource, limit in has["limits"].items():
            request = has["requests"].get(resource)
            if resource in own or is_device(resource) or request is None or milli(request) <= milli(limit):
                continue
            yield Finding(
                what="limit range",
                verdict="FAIL",
                found=f"{case.wanted.label}: container {container['name']} asks for {request} {resource}, and a "
                "LimitRange "
                f"gives it a default limit of {limit}: such a pod is invalid",
                fix=f"raise the LimitRange's default for {resource}, or ask for less in [resources] of cluster.toml",
            )


def _effective(case: Case, container: Json) -> dict[str, dict[str, str]]:
    """Requests and limits after the defaults of the namespace's limit ranges."""
    resources = container.get("resources") or {}
    requests, limits = dict(resources.get("requests") or {}), dict(resources.get("limits") or {})
    for item in case.snapshot.get("limitranges"):
        for bounds in (item.get("spec") or {}).get("limits") or ():
            if bounds.get("type") != "Container":
                continue
            default = {**(bounds.get("max") or {}), **(bounds.get("default") or {})}
            for resource, value in default.items():
                limits.setdefault(resource, value)
            for resource, value in {**default, **(bounds.get("defaultRequest") or {})}.items():
                requests.setdefault(resource, value)
    for resource, value in limits.items():
        requests.setdefault(resource, value)
    return {"requests": requests, "limits": limits}
