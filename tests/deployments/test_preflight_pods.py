"""What a manifest does to its own chances: one change to a sound one gives that row, that fix, and no other row."""

from __future__ import annotations

import pytest

from deployments.manifests import manifest
from deployments.preflight import preflight
from deployments.snapshot import Snapshot
from tests.deployments.preflight_faults import (
    Change,
    Document,
    faults,
)
from tests.deployments.preflight_kit import SOUND, place, training


def template(change: Change, *roles: str) -> Change:
    def apply(document: Document) -> None:
        for role in roles or ("Master", "Worker"):
            change(document["spec"]["pytorchReplicaSpecs"][role]["template"])

    return apply


def container(change: Change) -> Change:
    return template(lambda t: change(t["spec"]["containers"][0]))


def drop_shm(t: Document) -> None:
    t["spec"]["volumes"] = [v for v in t["spec"]["volumes"] if v["name"] != "shm"]


def bare_torchrun(document: Document) -> None:
    for replica in document["spec"]["pytorchReplicaSpecs"].values():
        replica["restartPolicy"] = "ExitCode"
        replica["template"]["spec"]["containers"][0]["command"] = ["torchrun", "train.py"]


def wrapper(seconds: str) -> Change:
    def apply(c: Document) -> None:
        c["command"][c["command"].index("--grace") + 1] = seconds

    return container(apply)


MANIFESTS: dict[str, tuple[Change, str, str, str, str]] = {
    "no /dev/shm": (template(drop_shm), "WARN", "/dev/shm", "/dev/shm of 64Mi", "shm ="),
    "/dev/shm as large as memory": (
        template(
            lambda t: next(v for v in t["spec"]["volumes"] if v["name"] == "shm")["emptyDir"].update(sizeLimit="32Gi")
        ),
        "WARN",
        "/dev/shm",
        "out-of-memory",
        "raise memory",
    ),
    "grace of five seconds": (
        lambda d: (template(lambda t: t["spec"].update(terminationGracePeriodSeconds=5))(d), wrapper("4")(d)),
        "WARN",
        "grace",
        "is 5",
        "[spot] grace",
    ),
    "grace beyond the notice": (
        template(lambda t: t["spec"].update(terminationGracePeriodSeconds=180), "Worker"),
        "WARN",
        "grace",
        "ends 120 s after its notice",
        'grace = "100s"',
    ),
    "wrapper outlives the pod": (
        wrapper("95"),
        "FAIL",
        "grace",
        "after 95 s, the pod is killed after 90 s",
        "leave out --grace",
    ),
    "do-not-disrupt": (
        template(lambda t: t["metadata"]["annotations"].update({"karpenter.sh/do-not-disrupt": "true"}), "Worker"),
        "WARN",
        "disruption",
        "no SIGTERM",
        "remove the annotation",
    ),
    "tolerates everything": (
        template(lambda t: t["spec"]["tolerations"].append({"operator": "Exists"})),
        "FAIL",
        "tolerations",
        "every taint",
        "single taints",
    ),
    "bare torchrun": (bare_torchrun, "FAIL", "restarts", "exits 1 on SIGTERM", "training.launch"),
    "restarts for ever": (
        lambda d: [r.update(restartPolicy="OnFailure") for r in d["spec"]["pytorchReplicaSpecs"].values()],
        "WARN",
        "restarts",
        "a bug starts again",
        "restartPolicy: Never",
    ),
    "backoffLimit": (
        lambda d: d["spec"]["runPolicy"].update(backoffLimit=3),
        "WARN",
        "restarts",
        "no budget of interruptions",
        "leave it out",
    ),
    "container of another name": (
        container(lambda c: c.update(name="trainer")),
        "FAIL",
        "restarts",
        "no container is named 'pytorch'",
        "name the training",
    ),
    "image by tag": (
        container(lambda c: c.update(image="registry.example/train:v3")),
        "WARN",
        "image",
        "by its tag 'v3'",
        "crane digest",
    ),
    "image without a tag": (
        container(lambda c: c.update(image="registry.example:5000/train")),
        "WARN",
        "image",
        "which means latest",
        "crane digest",
    ),
    "no image reference": (
        container(lambda c: c.update(image="Registry/Train")),
        "FAIL",
        "image",
        "no image reference",
        "lower case",
    ),
    "runs as root": (
        template(lambda t: t["spec"]["securityContext"].update(runAsUser=0)),
        "FAIL",
        "pod security",
        "runAsUser: 0",
        "lower the level",
    ),
    "privilege escalation": (
        container(lambda c: c["securityContext"].pop("allowPrivilegeEscalation")),
        "FAIL",
        "pod security",
        "lacks allowPrivilegeEscalation",
        "lower the level",
    ),
    "toleration left out": (
        template(lambda t: t["spec"].update(tolerations=[])),
        "FAIL",
        "taints",
        "nvidia.com/gpu=true:NoSchedule",
        "tolerations",
    ),
    "MIG slice that nobody offers": (
        container(
            lambda c: [
                c["resources"][side].update({"nvidia.com/mig-3g.40gb": c["resources"][side].pop("nvidia.com/gpu")})
                for side in ("requests", "limits")
            ]
        ),
        "FAIL",
        "resources",
        "no node has nvidia.com/mig-3g.40gb",
        'gpu_resource = "nvidia.com/gpu"',
    ),
    "affinity that no node has": (
        template(
            lambda t: t["spec"].update(
                affinity={
                    "nodeAffinity": {
                        "requiredDuringSchedulingIgnoredDuringExecution": {
                            "nodeSelectorTerms": [
                                {
                                    "matchExpressions": [
                                        {"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["eu-1c"]}
                                    ]
                                }
                            ]
                        }
                    }
                }
            )
        ),
        "FAIL",
        "node affinity",
        "required node affinity",
        "correct the affinity",
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_one_fault_of_the_manifest_is_one_row_with_its_fix(name: str) -> None:
    change, verdict, what, found, fix = MANIFESTS[name]
    made = manifest(training(), place())
    change(made)
    rows = faults(preflight(Snapshot.read(SOUND), [made], place()))
    assert [(r.verdict, r.what) for r in rows] == [(verdict, what)], rows
    assert found in rows[0].found, rows[0]
    assert fix in rows[0].fix, rows[0]


def test_a_save_that_does_not_fit_into_the_grace_is_told() -> None:
    rows = faults(preflight(Snapshot.read(SOUND), [training()], place(), save_seconds=70.0))
    assert [r.what for r in rows] == ["grace"]
    assert "a save takes 70 s" in rows[0].found


def test_a_job_that_the_place_refuses_is_a_row() -> None:
    rows = faults(preflight(Snapshot.read(SOUND), [training(grace_seconds=200.0)], place()))
    assert [(r.what, r.verdict) for r in rows] == [("manifest", "FAIL")]
