"""Where could these pods run: nodes as they are, nodes as they would be empty, nodes that Karpenter could make.

A FAIL means that no wait helps: counted per pod set on a cluster that nothing else uses but DaemonSets, which is exact
for pods that are alike. What is only taken now, or fits only together by luck, is a WARN. Pure.
Not covered: what the scheduler does beyond node_fit.py; priorities and preemption (they can only help).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from deployments import node_pools
from deployments.kube_quantity import milli, shown
from deployments.labels import WORKLOAD_LABEL
from deployments.node_fit import Obstacle, missing_device, obstacles, rooms, zone_obstacle
from deployments.preflight_findings import Case, Finding, Json, PodSet, is_device, pod_requests

FAR = 3  # obstacles of this weight are shown only where there is nothing nearer


@dataclass(kw_only=True)
class Site:
    """A node, or a NodePool that could make nodes, as seen by one pod set."""

    name: str
    found: list[Obstacle]
    ever: int = 0  # pods that it takes when nobody else uses it
    now: int = 0  # pods that it takes beside what runs there

    @property
    def distance(self) -> int:
        """How far it is from taking a pod."""
        return sum(o.weight for o in self.found)


@dataclass(kw_only=True)
class Capacities:
    """What the nodes have: empty but for DaemonSets, and beside what runs now."""

    empty: dict[str, Counter[str]] = field(default_factory=dict)
    free: dict[str, Counter[str]] = field(default_factory=dict)
    holders: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # resource -> who has it

    @classmethod
    def of(cls, case: Case) -> Capacities:
        """Count the pods of a snapshot; those of the workload itself are left out."""
        made = cls()
        for node in case.snapshot.get("nodes"):
            name = node["metadata"]["name"]
            made.empty[name] = Counter({r: milli(v) for r, v in node["status"]["allocatable"].items()})
            made.free[name] = Counter(made.empty[name])
        for pod in case.snapshot.get("pods"):
            node = pod["spec"].get("nodeName")
            ended = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
            own = (pod["metadata"].get("labels") or {}).get(WORKLOAD_LABEL) == case.wanted.name
            if node not in made.empty or ended or own:
                continue
            asked = pod_requests(pod["spec"])
            made.free[node].subtract(asked)
            if any(o["kind"] in ("DaemonSet", "Node") for o in pod["metadata"].get("ownerReferences") or ()):
                made.empty[node].subtract(asked)
            else:
                for resource, value in asked.items():
                    made.holders[resource][f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"] += value
        return made


def look_at_places(case: Case) -> Iterator[Finding]:
    """Whether there is, or could be, a place for every pod."""
    if not case.snapshot.known("nodes"):
        return
    capacities = Capacities.of(case)
    growth, well = unseen_growth(case), True
    for pods in case.wanted.sets:
        for finding in _set(case, pods, capacities):
            well = False
            if growth and finding.verdict == "FAIL":
                finding = replace(finding, verdict="WARN", found=f"{finding.found}; {growth}")
            yield finding
    if not well:
        return
    if _together(case, capacities):
        yield Finding(what="place", verdict="OK", found=_where(case, capacities))
    else:
        yield Finding(
            what="place",
            verdict="WARN",
            found=f"each pod of {case.wanted.label} finds a node, all of them at once may not",
            fix="they wait until others have ended: add nodes, or ask for less in [resources] of cluster.toml",
        )


def unseen_growth(case: Case) -> str:
    """Why a node may come that neither a node nor a NodePool of the snapshot stands for; "" if none may.

    A pool of nodes at zero is no fault. Where an autoscaler's nodes cannot be told beforehand, nothing is refused.
    """
    snapshot = case.snapshot
    if case.autoscaler == "yes":
        return "something adds nodes here ([nodes] autoscaler in cluster.toml): it may make one"
    if "nodepools" in snapshot.unreadable:
        return "a NodePool of Karpenter may make one, and they may not be read here"
    if case.autoscaler == "no":
        return ""
    if snapshot.get("autoscalers"):
        return "the cluster autoscaler may make one"
    if "autoscalers" in snapshot.unreadable:
        return "a cluster autoscaler may make one, and whether there is one may not be read here"
    return ""


def sites(case: Case, pods: PodSet, capacities: Capacities) -> list[Site]:
    """All nodes and pools with what is in the way of this pod set."""
    requests, found = pods.requests, []
    volumes = case.snapshot.get("persistentvolumes")
    for node in case.snapshot.get("nodes"):
        name = node["metadata"]["name"]
        there = obstacles(pods.spec, requests, node, capacities.empty[name])
        there += [o for v in volumes for o in zone_obstacle(v, node)]
        ever = 0 if there else rooms(requests, capacities.empty[name])
        now = 0 if there else rooms(requests, capacities.free[name])
        found.append(Site(name=name, found=there, ever=ever, now=now))
    for pool in case.snapshot.get("nodepools"):
        there = node_pools.obstacles(pods.spec, requests, pods.count, pool)
        room = 0 if there else pods.count
        found.append(Site(name=f"NodePool {pool['metadata']['name']}", found=there, ever=room, now=room))
    return found


def _set(case: Case, pods: PodSet, capacities: Capacities) -> Iterator[Finding]:
    all_sites = sites(case, pods, capacities)
    ever, now = sum(s.ever for s in all_sites), sum(s.now for s in all_sites)
    if ever >= pods.count:
        if now < pods.count:
            yield _busy(case, pods, capacities, now)
        return
    blocked = sorted((s for s in all_sites if s.found), key=lambda s: s.distance)
    near = [s for s in blocked if s.distance == blocked[0].distance] if blocked else []
    if ever and (not near or near[0].distance >= FAR):
        yield Finding(
            what="nodes",
            verdict="FAIL",
            found=f"{case.wanted.label} needs {pods.count} pods at once ({_role(pods)}), and all nodes that suit "
            f"take {ever}",
            fix="add nodes of that kind, or ask for fewer: replicas or gpus in [resources] of cluster.toml",
        )
        return
    if not near:
        yield Finding(what="nodes", verdict="FAIL", found="the cluster has no nodes", fix="add nodes, or a NodePool")
        return
    yield from _explained(case, pods, near)


def _explained(case: Case, pods: PodSet, near: list[Site]) -> Iterator[Finding]:
    """What is in the way on the nearest nodes, a row per kind."""
    waits = any(all(o.waits for o in site.found) for site in near)
    site = next((s for s in near if all(o.waits for o in s.found)), near[0])
    alike = [s.name for s in near if {o.kind for o in s.found} == {o.kind for o in site.found}]
    for obstacle in site.found:
        if obstacle.kind == "resource" and not obstacle.fix:
            obstacle = missing_device(obstacle.detail.partition("|")[0], case.snapshot.get("nodes"))
        more = f" (and {len(alike) - 1} more alike)" if len(alike) > 1 and obstacle.weight < FAR else ""
        yield Finding(
            what=WHAT.get(obstacle.kind, obstacle.kind),
            verdict="WARN" if waits else "FAIL",
            found=f"no node for {case.wanted.label} ({_role(pods)}): {obstacle.detail}{more}",
            fix=obstacle.fix,
        )


WHAT = {
    "cordoned": "cordoned nodes",
    "not ready": "nodes",
    "taint": "taints",
    "selector": "node selector",
    "affinity": "node affinity",
    "zone": "storage zone",
    "resource": "resources",
    "time slicing": "time slicing",
    "limit": "NodePool limits",
}


def _role(pods: PodSet) -> str:
    return f"{pods.count} x {pods.role.lower()}" if pods.count > 1 else pods.role.lower()


def _busy(case: Case, pods: PodSet, capacities: Capacities, now: int) -> Finding:
    requests = pods.requests
    scarce = next((r for r in requests if is_device(r)), None)
    who = ""
    if scarce:
        top = [f"{name} ({shown(scarce, v)})" for name, v in capacities.holders[scarce].most_common(3) if v]
        who = f"; {scarce} is held by {', '.join(top)}" if top else ""
    return Finding(
        what="free capacity",
        verdict="WARN",
        found=f"{case.wanted.label} needs {pods.count} pods at once ({_role(pods)}) and there is room for {now} "
        f"now{who}",
        fix="it waits until others have ended; nobody has to do anything, unless it should start sooner: add nodes",
    )


def _together(case: Case, capacities: Capacities) -> bool:
    """Whether all pods fit at once beside what runs now: greedy, the choosiest set first, the fullest node first."""
    left = {name: Counter(free) for name, free in capacities.free.items()}
    by_choice = sorted(
        ((p, sites(case, p, capacities)) for p in case.wanted.sets), key=lambda x: sum(1 for s in x[1] if s.ever)
    )
    for pods, places in by_choice:
        requests = pods.requests
        nodes = [s.name for s in places if not s.found and s.name in left]
        missing = pods.count
        while missing and (fitting := [n for n in nodes if rooms(requests, left[n])]):
            best = min(fitting, key=lambda n: rooms(requests, left[n]))
            left[best].subtract(requests)
            missing -= 1
        if missing and not any(s.ever for s in places if s.name not in left):
            return False
    return True


def _where(case: Case, capacities: Capacities) -> str:
    texts = []
    for pods in case.wanted.sets:
        good = [s for s in sites(case, pods, capacities) if s.now]
        names = ", ".join(s.name for s in good[:3]) + (f" and {len(good) - 3} more" if len(good) > 3 else "")
        texts.append(f"{_role(pods)}: {names}")
    return f"{case.wanted.label}: " + "; ".join(texts)


def nodes_that_suit(case: Case, pods: PodSet) -> list[Json]:
    """Nodes that could take such a pod, were they empty."""
    capacities = Capacities.of(case)
    good = {s.name for s in sites(case, pods, capacities) if s.ever}
    return [n for n in case.snapshot.get("nodes") if n["metadata"]["name"] in good]


def pools_that_suit(case: Case, pods: PodSet) -> list[Json]:
    """NodePools that could make a node for such a pod."""
    pools = case.snapshot.get("nodepools")
    return [p for p in pools if not node_pools.obstacles(pods.spec, pods.requests, pods.count, p)]
