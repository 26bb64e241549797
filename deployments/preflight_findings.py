"""The words of the preflight: a finding, and what a manifest asks of a cluster.

`wanted(manifest)` reads a Job or a PyTorchJob into pod sets: pods that are alike, and how many. Pure.
Not covered: what is looked for (preflight_*.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deployments.kube_quantity import milli
from deployments.labels import REQUEST_ANNOTATION, WORKLOAD_LABEL

Json = Mapping[str, Any]
Verdict = Literal["OK", "WARN", "FAIL"]
# What the operator adds to every worker of a job with a master (Training Operator 1.9).
OPERATOR_INIT: Json = {"limits": {"cpu": "100m", "memory": "20Mi"}, "requests": {"cpu": "50m", "memory": "10Mi"}}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row: what was looked at, what was found, what mends it."""

    what: str
    verdict: Verdict
    found: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class PodSet:
    """Pods that are alike."""

    role: str  # Job | Master | Worker
    count: int
    template: Json
    restart_policy: str

    @property
    def spec(self) -> Json:
        """The pod's spec."""
        return self.template.get("spec") or {}

    @property
    def containers(self) -> list[Json]:
        """The main containers."""
        return list(self.spec.get("containers") or [])

    @property
    def requests(self) -> Counter[str]:
        """What one pod asks of a node, in thousandths; `pods` included."""
        init = OPERATOR_INIT if self.role == "Worker" else None
        return pod_requests(self.spec, extra_init=init)

    @property
    def is_spot(self) -> bool:
        """Whether it asks for capacity that can be taken away."""
        return is_spot(self.spec.get("nodeSelector") or {})


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One object that is about to be created."""

    kind: str  # Job | PyTorchJob
    name: str
    namespace: str
    spec: Json
    sets: tuple[PodSet, ...]
    step: str = ""  # the step of the pipeline, for a person

    @property
    def is_training(self) -> bool:
        """Whether it is a PyTorchJob."""
        return self.kind == "PyTorchJob"

    @property
    def label(self) -> str:
        """How it is called in messages."""
        return self.step or self.name


@dataclass(frozen=True, kw_only=True)
class Case:
    """What every look is given."""

    wanted: Wanted
    snapshot: Any  # deployments.snapshot.Snapshot
    queue: str = ""
    autoscaler: str = "look"  # as ClusterPlace.autoscaler
    save_seconds: float | None = None  # of a checkpoint, as earlier attempts measured it
    trains: bool = True  # whether a training is among the workloads that are looked at together

    @property
    def has_namespace(self) -> bool:
        """Whether its namespace is there, as far as that can be seen: without it nothing in it is missed."""
        known = self.snapshot.known("namespaces")
        return not known or self.snapshot.find("namespaces", self.wanted.namespace) is not None


SPOT_LABELS = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "cloud.google.com/gke-preemptible": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
NOTICE = {"cloud.google.com/": 30.0, "kubernetes.azure.com/": 30.0}  # seconds; else 120


def is_spot(labels: Json) -> bool:
    """Whether labels, or a selector, mean capacity that can be taken away."""
    return any(str(labels.get(key, "")).lower() == value.lower() for key, value in SPOT_LABELS.items())


def notice_of(selector: Json) -> float:
    """Seconds between the notice and the end on the spot capacity that a selector asks for."""
    return min((s for key in selector for prefix, s in NOTICE.items() if key.startswith(prefix)), default=120.0)


def wanted(manifest: Json) -> Wanted:
    """Read a Job or a PyTorchJob. Raises ValueError for any other kind."""
    kind, metadata, spec = str(manifest.get("kind")), manifest["metadata"], manifest["spec"]
    labels = metadata.get("labels") or {}
    if kind == "Job":
        template = spec["template"]
        count = min(int(spec.get("parallelism") or 1), int(spec.get("completions") or 1))
        policy = str(template["spec"].get("restartPolicy") or "Always")
        sets: tuple[PodSet, ...] = (PodSet(role="Job", count=count, template=template, restart_policy=policy),)
    elif kind == "PyTorchJob":
        sets = tuple(
            PodSet(
                role=role,
                count=int(replica.get("replicas", 1)),
                template=replica["template"],
                restart_policy=str(replica.get("restartPolicy") or "OnFailure"),
            )
            for role, replica in spec["pytorchReplicaSpecs"].items()
        )
    else:
        raise ValueError(f"{kind} {metadata.get('name')}: the preflight knows Job and PyTorchJob")
    step = str(labels.get(WORKLOAD_LABEL.replace("workload", "step")) or "")
    namespace = str(metadata.get("namespace") or "default")
    return Wanted(kind=kind, name=str(metadata["name"]), namespace=namespace, spec=spec, sets=sets, step=step)


def pod_requests(spec: Json, *, extra_init: Json | None = None) -> Counter[str]:
    """What a pod asks of its node, as the scheduler counts it: containers and sidecars, or the largest init."""
    total: Counter[str] = Counter()
    for container in spec.get("containers") or ():
        total.update(_requests(container.get("resources") or {}))
    inits = [c for c in spec.get("initContainers") or () if c.get("restartPolicy") != "Always"]
    for container in spec.get("initContainers") or ():
        if container.get("restartPolicy") == "Always":
            total.update(_requests(container.get("resources") or {}))
    singles = [_requests(c.get("resources") or {}) for c in inits]
    if extra_init:
        singles.append(_requests(extra_init))
    for single in singles:
        for name, value in single.items():
            total[name] = max(total[name], value)
    for name, value in (spec.get("overhead") or {}).items():
        total[name] += milli(value)
    total["pods"] = 1000
    return total


def _requests(resources: Json) -> dict[str, int]:
    both = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    return {name: milli(value) for name, value in both.items()}


def is_device(resource: str) -> bool:
    """Whether a resource name is a device's: nvidia.com/gpu, nvidia.com/mig-1g.10gb, amd.com/gpu."""
    return "/" in resource and not resource.startswith(("kubernetes.io/", "requests.", "attachable-volumes"))


def devices(spec: Json) -> dict[str, int]:
    """The devices that a pod asks for: resource name to their number."""
    return {name: value // 1000 for name, value in pod_requests(spec).items() if is_device(name) and value}


def environment_of(pods: PodSet) -> dict[str, str]:
    """Environment variables with a literal value, of all containers."""
    return {e["name"]: e["value"] for c in pods.containers for e in c.get("env") or () if "value" in e}


def request_of(pods: PodSet) -> dict[str, Any]:
    """The request that travels inside the pod's annotations; {} if it does not."""
    try:
        found = json.loads((pods.template.get("metadata") or {}).get("annotations", {}).get(REQUEST_ANNOTATION, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def merged(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Rows that say the same of several pod sets or workloads once, the worst of them: same subject, same fix."""
    worst: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        key = (finding.what, finding.fix)
        if key not in worst or (finding.verdict == "FAIL" and worst[key].verdict == "WARN"):
            worst[key] = finding
    yield from worst.values()
