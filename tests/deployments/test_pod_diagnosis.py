from __future__ import annotations

from typing import Any

import pytest

from deployments.pod_diagnosis import ended, explain, not_created, waiting

Json = dict[str, Any]


def pod(**more: Any) -> Json:
    spec = more.pop("spec", {})
    return {"metadata": {"name": "p"}, "spec": spec, "status": {"phase": "Pending", **more}}


def held(reason: str, message: str = "", *, init: bool = False, **more: Any) -> Json:
    status = {
        "name": "step",
        "image": "reg/step:1",
        "state": {"waiting": {"reason": reason, "message": message}},
        **more,
    }
    return pod(**{"initContainerStatuses" if init else "containerStatuses": [status]})


def unschedulable(message: str, **spec: Any) -> Json:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return pod(spec=spec, conditions=[condition])


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (held("ErrImagePull", "manifest unknown"), ("reg/step:1 cannot be pulled (manifest unknown)", "push it")),
        (held("ImagePullBackOff", "401 Unauthorized"), ("image_pull_secrets",)),
        (held("ErrImagePull", "dial tcp: no such host"), ("does not answer from the node",)),
        (held("ImagePullBackOff"), ("(ImagePullBackOff)", "check its name")),
        (held("InvalidImageName"), ("'reg/step:1' is no image reference",)),
        (held("ErrImageNeverPull"), ("may not be pulled",)),
        (held("ErrImagePull", "not found", init=True), ("reg/step:1 cannot be pulled",)),
        (
            held("CreateContainerConfigError", 'secret "s3" not found'),
            ('secret "s3" not found', "create what it names"),
        ),
        (held("CrashLoopBackOff", lastState={"terminated": {"exitCode": 3}}), ("crashes at each start (exit 3)",)),
        (
            unschedulable("0/3 nodes are available: 3 Insufficient nvidia.com/gpu."),
            ("no node has enough nvidia.com/gpu free", "[resources.STEP]"),
        ),
        (
            unschedulable("0/2 nodes are available: 2 node(s) had untolerated taint {dedicated: research}."),
            ("toleration for taint dedicated",),
        ),
        (
            unschedulable("0/1 nodes are available: 1 node(s) had untolerated taint(s) {team: x}."),
            ("toleration for taint team",),
        ),
        (
            unschedulable("1 node(s) had untolerated taint {karpenter.sh/disrupted: }."),
            ("karpenter.sh/disrupted are being taken away",),
        ),
        (
            unschedulable(
                "0/3 nodes are available: 1 Insufficient cpu, 2 node(s) didn't match Pod's node affinity/selector.",
                nodeSelector={"a": "b", "pool": "gpu"},
            ),
            ("enough cpu free", "no node has the labels a=b, pool=gpu"),
        ),
        (unschedulable('persistentvolumeclaim "reprise" not found'), ("create the claim reprise",)),
        (unschedulable("pod has unbound immediate PersistentVolumeClaims"), ("ReadWriteMany",)),
        (unschedulable("2 node(s) had volume node affinity conflict"), ("another zone",)),
        (unschedulable("something new"), ("no node fits: something new", "kubectl describe pod")),
    ],
)
def test_what_holds_a_pod(item: Json, words: tuple[str, ...]) -> None:
    sentence = explain(item)
    for word in words:
        assert word in sentence
    assert "\n" not in sentence


def test_events_tell_what_the_status_does_not() -> None:
    event = {"reason": "FailedMount", "message": "MountVolume failed\n for x", "lastTimestamp": "2026", "metadata": {}}
    found = waiting(pod(), [event])
    assert found is not None and "MountVolume failed for x" in found.sentence
    assert waiting(pod()) is None and explain(pod()) == ""


def terminated(code: int, phase: str = "Failed", **more: Any) -> Json:
    return pod(phase=phase, containerStatuses=[{"name": "step", "state": {"terminated": {"exitCode": code, **more}}}])


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (terminated(137, reason="OOMKilled"), "raise memory in [resources.STEP]"),
        (terminated(1, message="Traceback\n  File\nValueError:  no\n"), "exit 1: ValueError: no"),
        (terminated(7), "exit 7"),
        (pod(phase="Failed", reason="Evicted", message="The node was low on resource: memory."), "raise memory"),
        (
            pod(phase="Failed", reason="Evicted", message="Pod ephemeral local storage usage exceeds the limit"),
            "write less",
        ),
        (pod(phase="Failed", reason="Evicted", message="low on resource: pids"), "the node ran short"),
        (pod(phase="Failed", message="Node is shutting down"), "Node is shutting down"),
        (pod(phase="Failed"), "no reason given"),
        (terminated(0, phase="Succeeded"), ""),
        (pod(phase="Running"), ""),
    ],
)
def test_why_a_pod_ended(item: Json, words: str) -> None:
    assert words in ended(item) if words else ended(item) == ""


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        ('pods "x" is forbidden: exceeded quota: q', "ResourceQuota"),
        ('violates PodSecurity "restricted:latest"', "label the namespace"),
        (
            'error looking up service account ns/reprise-step: serviceaccount "reprise-step" not found',
            "service_account",
        ),
        ("else", "kubectl describe"),
    ],
)
def test_why_there_is_no_pod(message: str, fix: str) -> None:
    event = {"reason": "FailedCreate", "message": message, "metadata": {"creationTimestamp": "2026"}}
    found = not_created([{"reason": "Other", "metadata": {}}, event])
    assert found is not None and fix in found.sentence and message in found.sentence
    assert not_created([]) is None
