"""What a manifest itself does to its own chances: graces, restarts, disruption, images, names that must exist. Pure.

Not covered: whether an image can be pulled (only a node knows), Pod Security (preflight_security.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from deployments import node_pools
from deployments.cluster_place import FORBIDDEN_TOLERATION
from deployments.pod_template import CONTAINERS
from deployments.preflight_findings import Case, Finding, Json, PodSet, notice_of
from deployments.preflight_scheduling import pools_that_suit

LEAST_GRACE = 15.0  # seconds; what a wrapper needs to stop workers after an agreed save
SAVE_MARGIN = 1.5  # a save under the platform's pressure takes longer than one in peace
DO_NOT_DISRUPT = "karpenter.sh/do-not-disrupt"
_DIGEST = re.compile(r".+@sha256:[0-9a-f]{64}")
_REFERENCE = re.compile(r"[a-z0-9]+([._\-/:][a-zA-Z0-9._\-/]+)*(@sha256:[0-9a-f]{64})?", re.I)
WRAPPER = "training.launch"


def look_at_graces(case: Case) -> Iterator[Finding]:
    """Save < wrapper < pod < node and notice: each must be done before the next one's patience ends."""
    if not case.wanted.is_training:
        return
    well = True
    for pods in case.wanted.sets:
        for finding in [*_own_grace(case, pods), *_outer_grace(case, pods)]:
            well = False
            yield finding
    if well:
        graces = ", ".join(f"{p.role.lower()} {_grace(p):g} s" for p in case.wanted.sets)
        yield Finding(what="grace", verdict="OK", found=f"{case.wanted.label}: {graces}")


def _grace(pods: PodSet) -> float:
    return float(pods.spec.get("terminationGracePeriodSeconds", 30))


def _wrapper_grace(pods: PodSet) -> float | None:
    for container in pods.containers:
        argv = [str(w) for w in [*(container.get("command") or ()), *(container.get("args") or ())]]
        if WRAPPER in argv and "--grace" in argv[:-1]:
            return float(argv[argv.index("--grace") + 1])
    return None


def _own_grace(case: Case, pods: PodSet) -> Iterator[Finding]:
    grace, wrapper = _grace(pods), _wrapper_grace(pods)
    if wrapper is not None and wrapper >= grace:
        yield Finding(
            what="grace",
            verdict="FAIL",
            found=f"{case.wanted.label}: the wrapper stops its workers after {wrapper:g} s, the pod is killed after "
            f"{grace:g} s",
            fix="leave out --grace, then the wrapper's is made from the pod's; or raise [spot] grace in cluster.toml",
        )
        return
    inner = wrapper if wrapper is not None else grace
    needed = max(LEAST_GRACE * 2 / 3, (case.save_seconds or 0.0) * SAVE_MARGIN)
    if grace < LEAST_GRACE or inner < needed:
        save = (
            f"a save takes {case.save_seconds:.3g} s"
            if case.save_seconds
            else "a save and the stop of workers take longer"
        )
        raised = max(LEAST_GRACE * 2, needed * 4 / 3 + 5)
        yield Finding(
            what="grace",
            verdict="WARN",
            found=f"{case.wanted.label}: terminationGracePeriodSeconds is {grace:g}, and {save}: an interruption "
            "loses the "
            "steps since the last checkpoint",
            fix=f'set [spot] grace = "{raised:.0f}s" in cluster.toml',
        )


def _outer_grace(case: Case, pods: PodSet) -> Iterator[Finding]:
    grace, selector = _grace(pods), pods.spec.get("nodeSelector") or {}
    if pods.is_spot and grace >= (notice := notice_of(selector)):
        yield Finding(
            what="grace",
            verdict="WARN",
            found=f"{case.wanted.label}: terminationGracePeriodSeconds is {grace:g}, and this spot capacity ends "
            f"{notice:g} s "
            "after its notice: the save is cut off",
            fix="set [spot] grace below it in cluster.toml: "
            f'grace = "{notice - 20 if notice > 60 else notice / 2:.0f}s"',
        )
        return
    for pool in pools_that_suit(case, pods):
        limit = node_pools.grace_seconds(pool)
        if limit is not None and grace > limit:
            yield Finding(
                what="grace",
                verdict="WARN",
                found=f"{case.wanted.label}: terminationGracePeriodSeconds is {grace:g}, and NodePool "
                f"{pool['metadata']['name']} gives its nodes {limit:g} s: Karpenter deletes such pods early",
                fix=f"raise spec.template.spec.terminationGracePeriod of the NodePool above {grace:g} s, or lower "
                "[spot] "
                "grace in cluster.toml",
            )


def look_at_disruption(case: Case) -> Iterator[Finding]:
    """Annotations and tolerations that take the notice away."""
    for pods in case.wanted.sets:
        annotations = (pods.template.get("metadata") or {}).get("annotations") or {}
        if pods.is_spot and str(annotations.get(DO_NOT_DISRUPT)).lower() == "true":
            yield Finding(
                what="disruption",
                verdict="WARN",
                found=f"{case.wanted.label}: {DO_NOT_DISRUPT} on a spot pod does not stop the interruption, it "
                "blocks the "
                "eviction: the pod gets no SIGTERM and saves nothing",
                fix="remove the annotation; consolidation is held back by consolidationPolicy: WhenEmpty of the "
                "NodePool",
            )
        for toleration in pods.spec.get("tolerations") or ():
            everything = not toleration.get("key") and toleration.get("operator") == "Exists"
            if everything or toleration.get("key") == FORBIDDEN_TOLERATION:
                yield Finding(
                    what="tolerations",
                    verdict="FAIL",
                    found=f"{case.wanted.label}: tolerates {toleration.get('key') or 'every taint'}: Karpenter does "
                    "not evict "
                    "such pods before their node goes, and cordoned or broken nodes take them",
                    fix="name single taints in tolerations of cluster.toml, none of them " + FORBIDDEN_TOLERATION,
                )


def look_at_restarts(case: Case) -> Iterator[Finding]:
    """Who starts again what ended: the flow, and nobody else."""
    spec = case.wanted.spec
    if not case.wanted.is_training:
        if int(spec.get("backoffLimit", 6)) > 0:
            yield Finding(
                what="restarts",
                verdict="WARN",
                found=f"{case.wanted.label}: backoffLimit of the Job is {spec.get('backoffLimit', '6 by default')}: "
                "a step "
                "that failed runs again unseen, beside the flow's own retries",
                fix="set backoffLimit: 0; disruptions do not count, by the podFailurePolicy",
            )
        return
    policy = spec.get("runPolicy") or {}
    if "backoffLimit" in policy:
        yield Finding(
            what="restarts",
            verdict="WARN",
            found=f"{case.wanted.label}: runPolicy.backoffLimit = {policy['backoffLimit']} counts container "
            "restarts of running "
            "pods, never a pod that was taken with its node: it is no budget of interruptions",
            fix="leave it out; [train] interruptions and errors are the budgets",
        )
    for pods in case.wanted.sets:
        yield from _policy(case, pods)


def _policy(case: Case, pods: PodSet) -> Iterator[Finding]:
    argv = [str(w) for c in pods.containers for w in [*(c.get("command") or ()), *(c.get("args") or ())]]
    wrapped = WRAPPER in argv
    names = [c["name"] for c in pods.containers]
    if CONTAINERS["train"] not in names:
        yield Finding(
            what="restarts",
            verdict="FAIL",
            found=f"{case.wanted.label}: no container is named {CONTAINERS['train']!r} ({', '.join(names)}); the "
            "operator "
            "reads exit codes of that one only",
            fix=f"name the training container {CONTAINERS['train']}",
        )
    if pods.restart_policy == "ExitCode" and not wrapped:
        yield Finding(
            what="restarts",
            verdict="FAIL",
            found=f"{case.wanted.label}: restartPolicy ExitCode without the wrapper {WRAPPER}: bare torchrun exits "
            "1 on "
            "SIGTERM, which is permanent: the first interruption fails the job",
            fix=f"start it with python -m {WRAPPER}, which exits 143 when it is interrupted",
        )
    elif pods.restart_policy in ("OnFailure", "Always"):
        yield Finding(
            what="restarts",
            verdict="WARN",
            found=f"{case.wanted.label}: restartPolicy {pods.restart_policy}: a bug starts again for ever, and "
            "attempts "
            "are missing in the ledger",
            fix="set restartPolicy: Never; the flow starts the next attempt",
        )


def look_at_images(case: Case) -> Iterator[Finding]:
    """Images by digest."""
    well = True
    for image in dict.fromkeys(str(c.get("image") or "") for p in case.wanted.sets for c in p.containers):
        if _DIGEST.fullmatch(image):
            continue
        well = False
        if not _REFERENCE.fullmatch(image) or any(ch.isupper() for ch in image.partition(":")[0].partition("@")[0]):
            yield Finding(
                what="image",
                verdict="FAIL",
                found=f"{image!r} is no image reference",
                fix="correct [images] in cluster.toml: registry/name@sha256:... in lower case",
            )
            continue
        tag = image.rpartition("/")[2].partition(":")[2]
        moving = "without a tag, which means latest" if not tag else f"by its tag {tag!r}"
        yield Finding(
            what="image",
            verdict="WARN",
            found=f"{image} is named {moving}: nodes and attempts may run different code under one step key",
            fix=f"name the digest in [images] of cluster.toml: crane digest {image}",
        )
    if well:
        yield Finding(what="image", verdict="OK", found=f"{case.wanted.label}: by digest")


def look_at_references(case: Case) -> Iterator[Finding]:
    """What the pods name exists: service account, priority class, Secrets, queue."""
    snapshot, here = case.snapshot, case.wanted.namespace
    if not case.has_namespace:
        return
    for pods in case.wanted.sets:
        account = str(pods.spec.get("serviceAccountName") or "default")
        if snapshot.known("serviceaccounts") and not snapshot.find("serviceaccounts", account):
            yield Finding(
                what="service account",
                verdict="FAIL",
                found=f"service account {account} is not in namespace {here}: no pod can be created",
                fix=f"kubectl -n {here} create serviceaccount {account}, or correct service_account in cluster.toml",
            )
        priority = pods.spec.get("priorityClassName")
        if priority and snapshot.known("priorityclasses") and not snapshot.find("priorityclasses", priority):
            yield Finding(
                what="priority class",
                verdict="FAIL",
                found=f"priority class {priority} does not exist: no pod can be created",
                fix="create it, or correct priority_class in cluster.toml",
            )
        if snapshot.known("secrets"):
            yield from _secrets(case, pods)
    if case.queue and snapshot.known("localqueues") and not snapshot.find("localqueues", case.queue, here):
        yield Finding(
            what="queue",
            verdict="FAIL",
            found=f"LocalQueue {case.queue} is not in namespace {here}: jobs stay suspended",
            fix="create it, or correct queue in cluster.toml",
        )


def _secrets(case: Case, pods: PodSet) -> Iterator[Finding]:
    here = case.wanted.namespace
    for name in (s["secretRef"]["name"] for c in pods.containers for s in c.get("envFrom") or () if "secretRef" in s):
        if not case.snapshot.find("secrets", name):
            yield Finding(
                what="secrets",
                verdict="FAIL",
                found=f"Secret {name} is not in namespace {here}: containers that take their environment from it "
                "never start",
                fix=f"kubectl -n {here} create secret generic {name} --from-env-file=FILE, or correct env_secrets",
            )
    for name in (str(s["name"]) for s in pods.spec.get("imagePullSecrets") or ()):
        found: Json | None = case.snapshot.find("secrets", name)
        fix = (
            f"kubectl -n {here} create secret docker-registry {name} --docker-server=..., or correct image_pull_secrets"
        )
        if found is None:
            text = f"image pull secret {name} is not in namespace {here}: private images are pulled without credentials"
            yield Finding(what="image pull", verdict="WARN", found=text, fix=fix)
        elif found["type"] not in ("kubernetes.io/dockerconfigjson", "kubernetes.io/dockercfg"):
            text = f"image pull secret {name} is of type {found['type']}, which no kubelet takes for a registry"
            yield Finding(what="image pull", verdict="WARN", found=text, fix=fix)
