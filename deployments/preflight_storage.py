"""The claims that pods mount, and the size of /dev/shm. Pure.

Not covered: how fast the storage is, how full.
"""

from __future__ import annotations

from collections.abc import Iterator

from deployments.kube_quantity import milli, shown
from deployments.preflight_findings import Case, Finding, Json, PodSet, devices
from deployments.preflight_scheduling import nodes_that_suit, pools_that_suit

DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
SHM_PER_PROCESS = milli("64Mi")  # what a container runtime gives to one container; NCCL and data loaders need more


def look_at_claims(case: Case) -> Iterator[Finding]:
    """Every claim is there, bound or about to be, and may be mounted on as many nodes as are used."""
    if not case.snapshot.known("persistentvolumeclaims") or not case.has_namespace:
        return
    for name in dict.fromkeys(n for p in case.wanted.sets for n in _claims(p)):
        claim = case.snapshot.find("persistentvolumeclaims", name, case.wanted.namespace)
        if claim is None:
            yield Finding(
                what="state claim",
                verdict="FAIL",
                found=f"claim {name} is not in namespace {case.wanted.namespace}",
                fix="create it (kubectl apply -k of the overlay does), or correct state_claim in cluster.toml",
            )
            continue
        trouble = list(_bound(case, claim)) or list(_modes(case, claim))
        yield from trouble
        if not trouble:
            modes = ", ".join((claim.get("spec") or {}).get("accessModes") or ())
            yield Finding(what="state claim", verdict="OK", found=f"{name}: {modes}")


def _claims(pods: PodSet) -> Iterator[str]:
    for volume in pods.spec.get("volumes") or ():
        if claim := (volume.get("persistentVolumeClaim") or {}).get("claimName"):
            yield str(claim)


def _bound(case: Case, claim: Json) -> Iterator[Finding]:
    name, spec = claim["metadata"]["name"], claim.get("spec") or {}
    phase = (claim.get("status") or {}).get("phase", "Pending")
    if claim["metadata"].get("deletionTimestamp"):
        yield Finding(
            what="state claim",
            verdict="FAIL",
            found=f"claim {name} is being deleted and waits for the last pod that mounts it",
            fix="let it go and create it anew; copy what is on it first",
        )
    elif phase == "Lost":
        yield Finding(
            what="state claim",
            verdict="FAIL",
            found=f"claim {name} is Lost: its volume is gone",
            fix="restore the volume, or create the claim anew",
        )
    elif phase == "Pending":
        yield from _pending(case, name, spec)


def _pending(case: Case, name: str, spec: Json) -> Iterator[Finding]:
    if not case.snapshot.known("storageclasses"):
        return
    classes = case.snapshot.get("storageclasses")
    wanted = spec.get("storageClassName")
    if wanted is None:
        found = [c for c in classes if (c["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true"]
        missing = "it names no storage class and the cluster has no default one"
    else:
        found = [c for c in classes if c["metadata"]["name"] == wanted]
        missing = f"its storage class {wanted!r} does not exist"
    known = ", ".join(sorted(c["metadata"]["name"] for c in classes)) or "none"
    if not found and not spec.get("volumeName"):
        yield Finding(
            what="state claim",
            verdict="FAIL",
            found=f"claim {name} is Pending: {missing} (there are: {known})",
            fix="set storageClassName to one that gives ReadWriteMany (a shared file system), in the overlay",
        )
    elif found and found[0].get("volumeBindingMode") != "WaitForFirstConsumer":
        yield Finding(
            what="state claim",
            verdict="WARN",
            found=f"claim {name} is Pending: provisioner {found[0].get('provisioner')} has not made a volume",
            fix=f"kubectl -n {case.wanted.namespace} describe pvc {name}",
        )


def _modes(case: Case, claim: Json) -> Iterator[Finding]:
    name, modes = claim["metadata"]["name"], set((claim.get("spec") or {}).get("accessModes") or ())
    if "ReadWriteMany" in modes:
        return
    fix = "make it anew with accessModes: [ReadWriteMany] on a class that gives it (EFS, Filestore, Azure Files, NFS)"
    if not modes & {"ReadWriteOnce", "ReadWriteOncePod"}:
        found = f"claim {name} is {', '.join(sorted(modes))}: checkpoints cannot be written"
        yield Finding(what="state claim", verdict="FAIL", found=found, fix=fix)
        return
    pods, many = sum(p.count for p in case.wanted.sets), _several_nodes(case)
    if modes == {"ReadWriteOncePod"}:
        found = f"claim {name} is ReadWriteOncePod, and the flow and its steps mount it together"
        yield Finding(what="state claim", verdict="FAIL", found=found, fix=fix)
    elif pods > 1 and many:
        found = (
            f"claim {name} is ReadWriteOnce, and {case.wanted.label} has {pods} pods: those on a second node "
            "never start"
        )
        yield Finding(what="state claim", verdict="FAIL", found=found, fix=fix)
    elif many:
        found = (
            f"claim {name} is ReadWriteOnce: while the flow holds it on one node, {case.wanted.label} starts on "
            "no other"
        )
        yield Finding(what="state claim", verdict="WARN", found=found, fix=fix)


def _several_nodes(case: Case) -> bool:
    """Whether pods may come to lie on more than one node of the cluster."""
    if any(pools_that_suit(case, p) for p in case.wanted.sets):
        return True
    return len(case.snapshot.get("nodes")) > 1 or any(len(nodes_that_suit(case, p)) > 1 for p in case.wanted.sets)


def look_at_shm(case: Case) -> Iterator[Finding]:
    """Processes that share GPUs of a node talk through /dev/shm; a container gets 64Mi of it."""
    if not case.wanted.is_training:
        return
    processes = _processes(case)
    for pods in case.wanted.sets:
        size, memory = _shm(pods), _memory(pods)
        if processes > 1 and devices(pods.spec) and (size is None or size < SHM_PER_PROCESS * processes):
            has = "64Mi" if size is None else shown("memory", size)
            yield Finding(
                what="/dev/shm",
                verdict="WARN",
                found=f"{case.wanted.label}: {processes} processes a pod on GPUs and a /dev/shm of {has}: NCCL and "
                "data "
                "loaders end with a bus error when it is full",
                fix='set shm = "8Gi" in [resources.train_model] of cluster.toml (an emptyDir in memory)',
            )
        elif size and memory and size >= memory:
            yield Finding(
                what="/dev/shm",
                verdict="WARN",
                found=f"{case.wanted.label}: /dev/shm of {shown('memory', size)} counts as memory, and the limit is "
                f"{shown('memory', memory)}: filling it is an out-of-memory kill",
                fix="raise memory in [resources.train_model] of cluster.toml above shm, or make shm smaller",
            )
        elif size is not None:
            yield Finding(what="/dev/shm", verdict="OK", found=f"{case.wanted.label}: {shown('memory', size)}")


def _processes(case: Case) -> int:
    text = str(case.wanted.spec.get("nprocPerNode") or "1")
    if text.isdigit():
        return int(text)
    return max((n for p in case.wanted.sets for n in devices(p.spec).values()), default=1)  # auto, gpu


def _shm(pods: PodSet) -> int | None:
    """Size of the volume at /dev/shm in thousandths of bytes; None if there is none."""
    mounted = {m["name"] for c in pods.containers for m in c.get("volumeMounts") or () if m["mountPath"] == "/dev/shm"}
    for volume in pods.spec.get("volumes") or ():
        if volume["name"] in mounted and "emptyDir" in volume:
            limit = (volume["emptyDir"] or {}).get("sizeLimit")
            return milli(limit) if limit else (_memory(pods) or milli("1Ti")) - 1
    return None


def _memory(pods: PodSet) -> int:
    return sum(milli(((c.get("resources") or {}).get("limits") or {}).get("memory", "0")) for c in pods.containers)
