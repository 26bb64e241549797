"""Pure: why a pod does not run, or why it ended, in one sentence that ends with what to do.

    explain(pod, events) -> "image registry/x:1 cannot be pulled (not found): check the name ..." or ""

Reads the pod's status as the API gives it, and the scheduler's own words. Not covered: what the end of a pod means for
an attempt (pod_causes.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]
PULL_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
# What somebody has to put right, although it may come right by itself if they do so soon.
FATAL = (*PULL_REASONS, "CreateContainerConfigError", "MissingClaim")
CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
# No number of repetitions helps these; what pulls or mounts may come right by itself.
HOPELESS = ("InvalidImageName", "ErrImageNeverPull")


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """What a pod waits for: the API's reason, and one sentence with the fix."""

    reason: str  # Unschedulable, ErrImagePull, CreateContainerConfigError, FailedMount, ...
    sentence: str


def explain(pod: Json, events: Iterable[Json] = ()) -> str:
    """One sentence on what holds or ended the pod; "" if it is well."""
    return ended(pod) or (found.sentence if (found := waiting(pod, events)) else "")


def waiting(pod: Json, events: Iterable[Json] = ()) -> Waiting | None:
    """What a pod that has not started waits for; None if it is well or has ended."""
    status = pod.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed"):
        return None
    for container in containers(pod):
        state = (container.get("state") or {}).get("waiting") or {}
        reason, text = state.get("reason", ""), one_line(state.get("message", ""))
        if reason in PULL_REASONS:
            return Waiting(reason=reason, sentence=_pull(container, reason, text))
        if reason in CONFIG_REASONS:
            fix = "create what it names, or correct the name in cluster.toml"
            return Waiting(reason=reason, sentence=f"container {container['name']} cannot start: {text}; {fix}")
        if reason == "CrashLoopBackOff":
            last = ((container.get("lastState") or {}).get("terminated") or {}).get("exitCode")
            sentence = f"container {container['name']} crashes at each start (exit {last}); read its log"
            return Waiting(reason=reason, sentence=sentence)
    condition = _condition(status, "PodScheduled")
    if condition.get("status") == "False":
        reason = condition.get("reason", "Unschedulable")
        if reason == "SchedulingGated":
            return Waiting(reason=reason, sentence="it is held by a scheduling gate; whoever set it has to lift it")
        text = one_line(condition.get("message", ""))
        reason = "MissingClaim" if re.search(r'persistentvolumeclaim "[^"]+" not found', text) else reason
        return Waiting(reason=reason, sentence=_unschedulable(pod, text))
    for event in sorted(events, key=_time, reverse=True):
        if event.get("reason") in ("FailedMount", "FailedAttachVolume"):
            text = one_line(event.get("message", ""))
            fix = "look whether the claim is Bound and its storage reachable: kubectl describe pvc"
            return Waiting(reason=event["reason"], sentence=f"a volume cannot be mounted: {text}; {fix}")
    return None


def not_created(events: Iterable[Json]) -> Waiting | None:
    """Why a Job or PyTorchJob has no pod: what its controller told in events; None if it told nothing."""
    for event in sorted(events, key=_time, reverse=True):
        if event.get("reason") in ("FailedCreate", "FailedCreatePod", "FailedCreateService"):
            text = one_line(event.get("message", ""))
            if "exceeded quota" in text:
                fix = "wait for room, ask for less in [resources.STEP], or raise the ResourceQuota"
            elif "violates PodSecurity" in text:
                fix = "label the namespace with a level that these pods keep, or configure what adds to them"
            elif "serviceaccount" in text.lower() and "not found" in text:
                fix = "create the service account, or correct service_account in cluster.toml"
            else:
                fix = "kubectl describe shows more"
            return Waiting(reason="FailedCreate", sentence=f"no pod can be created: {text}; {fix}")
    return None


def ended(pod: Json) -> str:
    """Why a pod that has ended did so; "" if it has not, or succeeded."""
    status, name = pod.get("status") or {}, pod["metadata"]["name"]
    if status.get("reason") == "Evicted":
        return (
            f"pod {name} was evicted: {one_line(status.get('message', ''))}; {_evicted_fix(status.get('message', ''))}"
        )
    for container in containers(pod):
        terminated = (container.get("state") or {}).get("terminated") or {}
        if terminated.get("reason") == "OOMKilled":
            return (
                f"container {container['name']} of pod {name} needed more memory than its limit and was killed; raise "
                "memory in [resources.STEP], or make batches or workers fewer"
            )
    if disruption := _condition(status, "DisruptionTarget"):
        return f"pod {name}: {disruption.get('reason', '')}: {one_line(disruption.get('message', ''))}"
    if status.get("phase") != "Failed":
        return ""
    for container in containers(pod):
        terminated = (container.get("state") or {}).get("terminated") or {}
        if code := terminated.get("exitCode"):
            said = last_line(terminated.get("message", ""))
            return f"container {container['name']} of pod {name}: exit {code}{f': {said}' if said else ''}"
    return f"pod {name} failed: {one_line(status.get('message', '') or status.get('reason', '') or 'no reason given')}"


def containers(pod: Json) -> Iterator[dict[str, Any]]:
    """The statuses of all containers, the init ones first."""
    status = pod.get("status") or {}
    yield from status.get("initContainerStatuses") or ()
    yield from status.get("containerStatuses") or ()


def last_line(text: str) -> str:
    """The last line that says something: of a traceback the error, of a log the program's last word."""
    lines = [line for line in str(text).splitlines() if line.strip()]
    return one_line(lines[-1])[:300] if lines else ""


def one_line(text: str) -> str:
    """The text in one line, without the full stop at its end."""
    return " ".join(str(text).split()).rstrip(".")


def _condition(status: Json, kind: str) -> dict[str, Any]:
    return next((c for c in status.get("conditions") or () if c.get("type") == kind), {})


def _pull(container: Json, reason: str, text: str) -> str:
    image, low = container.get("image") or "?", text.lower()
    if reason == "InvalidImageName":
        return f"image {image!r} is no image reference; correct it in [images] of cluster.toml"
    if reason == "ErrImageNeverPull":
        return f"image {image} is not on the node and may not be pulled; load it there, or set image_pull_policy"
    if any(word in low for word in ("unauthorized", "denied", "authorization", "forbidden")):
        fix = "give the registry's Secret in image_pull_secrets, or grant the node's role access"
    elif any(word in low for word in ("not found", "manifest unknown", "no such image")):
        fix = "push it, or correct name, tag or digest in [images] of cluster.toml"
    elif any(word in low for word in ("timeout", "no such host", "refused", "unreachable", "toomanyrequests")):
        fix = "the registry does not answer from the node: look at its network, or at the registry's rate limit"
    else:
        fix = "check its name, its tag and image_pull_secrets in cluster.toml"
    return f"image {image} cannot be pulled ({text or reason}); {fix}"


def _unschedulable(pod: Json, text: str) -> str:
    """The scheduler's summary, and the fix of what most nodes lack."""
    spec, fixes = pod.get("spec") or {}, []
    selector = ", ".join(f"{k}={v}" for k, v in sorted((spec.get("nodeSelector") or {}).items()))
    for taint in dict.fromkeys(re.findall(r"untolerated taint(?:\(s\))? \{([^}]*)\}", text)):
        key = taint.partition(":")[0].strip()
        if key == "karpenter.sh/disrupted":
            fixes.append(f"nodes with taint {key} are being taken away: their replacements are on their way")
        elif key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
            fixes.append(f"nodes with taint {key} do not answer")
        else:
            fixes.append(f"add a toleration for taint {key} to cluster.toml if the workload may run there")
    for resource in dict.fromkeys(re.findall(r"Insufficient ([A-Za-z0-9./_-]+)", text)):
        fixes.append(f"no node has enough {resource.rstrip('.')} free: ask for less in [resources.STEP], or add nodes")
    if "node affinity/selector" in text:
        fixes.append(f"no node has the labels {selector or 'asked for'}: add such nodes, or change the selector")
    if found := re.search(r'persistentvolumeclaim "([^"]+)" not found', text):
        fixes.append(f"create the claim {found[1]}, or correct state_claim in cluster.toml")
    elif "unbound immediate PersistentVolumeClaims" in text:
        fixes.append("the state claim is not Bound: it needs a ReadWriteMany storage class (kubectl describe pvc)")
    if "volume node affinity conflict" in text:
        fixes.append("the state volume is in another zone: use storage that all zones reach")
    if "anti-affinity" in text or "topology spread" in text:
        fixes.append("the spread asked for leaves no node: add nodes")
    return f"no node fits: {text}" + (f"; {'; '.join(fixes)}" if fixes else "; kubectl describe pod shows more")


def _evicted_fix(text: str) -> str:
    if "ephemeral" in text:
        return "write less to /tmp, or to the state volume instead"
    if "memory" in text:
        return "raise memory in [resources.STEP] to what it uses: what is over its request goes first"
    return "the node ran short: ask for what is used in [resources.STEP]"


def _time(event: Json) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")
