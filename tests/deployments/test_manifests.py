"""The objects as text. After a wanted change: REPRISE_WRITE_GOLDEN=1 pytest this file, and read the diff."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.cluster_place import ClusterPlace
from deployments.errors import ConfigError, GiveUp
from deployments.labels import label_value
from deployments.manifests import manifest, step_job, training_job, yaml_of
from deployments.pod_template import REQUEST_LIMIT, request_is_inside
from deployments.serving_manifests import Serving, serving_objects
from deployments.workload import Resources, Workload

GOLDEN = Path(__file__).parents[1] / "golden"
DIGEST = "sha256:" + "0" * 64
PLACE = ClusterPlace(
    images={name: f"registry.example/reprise-{name}@{DIGEST}" for name in ("flow", "step", "train", "serve")},
    env_secrets=("reprise-s3",),
    image_pull_secrets=("registry",),
)
STEP = Workload(
    name="register-model-0123456789ab",
    image="step",
    command=("python", "-m", "tasks.step", "register_model", "{request}", "{result}"),
    request={"key": "0123456789ab", "metrics": {"accuracy": 0.97}},
    resources=Resources(cpus=0.5, memory="2Gi"),
    grace_seconds=30,
    deadline_seconds=3600,
    labels={"run": "20260101-120000-a1b2", "pipeline": "digits", "step": "register_model", "key": "0123456789ab"},
)
TRAINING = Workload(
    name="train-0123456789ab-2",
    image="train",
    command=("python", "-m", "training.launch", "--spec", "{request}", "--processes", "2"),
    request={"key": "0123456789ab", "attempt": 2},
    env={"OMP_NUM_THREADS": "2"},
    resources=Resources(cpus=4, memory="8Gi"),
    processes=2,
    spot=False,
    grace_seconds=90,
    deadline_seconds=86400,
    labels={"pipeline": "digits", "step": "train_model", "key": "0123456789ab"},
)
SPOT = replace(
    TRAINING,
    command=(*TRAINING.command[:-1], "8"),
    resources=Resources(cpus=90, memory="900Gi", gpus=8, shm="64Gi"),
    replicas=4,
    processes=8,
    spot=True,
)
SLICE = replace(
    TRAINING,
    resources=Resources(cpus=2, memory="16Gi", gpus=1, gpu_resource="nvidia.com/mig-1g.10gb", shm="2Gi"),
    processes=1,
    spot=True,
)
GPU_PLACE = replace(PLACE, gpu_selector={"accelerator": "nvidia-a100"}, nccl_interface="eth0", queue="research")
CASES = {
    "step": (STEP, PLACE),
    "train-cpu-1x2": (TRAINING, PLACE),
    "train-spot-4x8": (SPOT, GPU_PLACE),
    "train-mig": (SLICE, PLACE),
    "train-on-demand-4x8": (replace(SPOT, name="train-0123456789ab-9", spot=False), GPU_PLACE),
}


SERVING = Serving(
    pipeline="digits",
    version="3",
    label="3.1a2b3c4d",
    mar="/reprise/store/models/digits-3.1a2b3c4d.mar",
    sha256="f" * 64,
    golden="/reprise/store/trainings/0123456789ab/output/heldout.jsonl",
)


def pod_specs(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if item["kind"] == "PyTorchJob":
        yield from (r["template"]["spec"] for r in item["spec"]["pytorchReplicaSpecs"].values())
    else:
        yield item["spec"]["template"]["spec"]


def test_goldens() -> None:
    objects = {name: [manifest(workload, place)] for name, (workload, place) in CASES.items()}
    for name, items in {**objects, "serving": serving_objects(SERVING, PLACE)}.items():
        text, path = yaml_of(items), GOLDEN / f"{name}.yaml"
        if os.environ.get("REPRISE_WRITE_GOLDEN"):
            path.write_text(text)
        assert text == path.read_text(), f"{path} differs: read the diff, then write it anew as the module says"
        assert list(yaml.safe_load_all(text)) == items


def test_a_rollout_takes_no_ready_pod_away_and_a_pod_that_leaves_serves_on() -> None:
    from kubernetes.client import V1Deployment, V1PodDisruptionBudget, V1Service

    service, budget, deployment = serving_objects(SERVING, PLACE)
    V1Service.model_validate(service)
    V1PodDisruptionBudget.model_validate(budget)
    V1Deployment.model_validate(deployment)
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    spec = deployment["spec"]["template"]["spec"]
    main = spec["containers"][0]
    drain = float(main["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] >= drain + SERVING.response_timeout
    assert "ready" in main["readinessProbe"]["exec"]["command"]  # the model's answer, not an open port
    assert all(mount["name"] != "state" for mount in main["volumeMounts"])  # what it serves is its own copy
    fetch = spec["initContainers"][0]["command"]
    assert fetch[fetch.index("--sha256") + 1] == "f" * 64
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert selector == service["spec"]["selector"] == budget["spec"]["selector"]["matchLabels"]
    assert selector.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    other = serving_objects(replace(SERVING, version="4", label="4.x"), PLACE)
    assert other[:2] == [service, budget] and other[2]["spec"]["selector"] == deployment["spec"]["selector"]


def test_only_a_step_that_deploys_gets_a_token_and_a_way_to_the_api_server() -> None:
    for account, name in (("", "reprise-step"), ("deploy", "reprise-deploy")):
        template = step_job(replace(STEP, account=account), PLACE)["spec"]["template"]
        assert template["spec"]["serviceAccountName"] == name
        assert template["spec"]["automountServiceAccountToken"] == bool(account)
        assert template["metadata"]["labels"].get("reprise.dev/account", "") == account
    served = serving_objects(SERVING, PLACE)[2]["spec"]["template"]["spec"]
    assert (served["serviceAccountName"], served["automountServiceAccountToken"]) == ("reprise-serve", False)


def test_served_models_on_gpus_stay_off_spot_capacity() -> None:
    place = replace(PLACE, gpu_selector={"accelerator": "nvidia-a100"})
    spec = serving_objects(replace(SERVING, resources=Resources(gpus=1)), place)[2]["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand", "accelerator": "nvidia-a100"}
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def test_steps_and_served_models_share_the_state_volume_by_one_group() -> None:
    step, served = step_job(STEP, PLACE), serving_objects(SERVING, PLACE)[2]
    for item in (step, served):
        security = item["spec"]["template"]["spec"]["securityContext"]
        assert security["fsGroup"] == security["runAsGroup"] == security["runAsUser"] == 10001


def test_a_service_name_is_a_dns_label() -> None:
    for pipeline in ("Digits_v1.0", "x" * 80, "a b"):
        name = replace(SERVING, pipeline=pipeline).name
        assert name.startswith("serve-") and len(name) <= 63
        step_job(replace(STEP, name=name), PLACE)


@pytest.mark.parametrize("name", CASES)
def test_the_kubernetes_client_knows_every_field(name: str) -> None:
    from kubernetes.client import V1Job, V1PodTemplateSpec

    item = manifest(*CASES[name])
    if item["kind"] == "Job":
        V1Job.model_validate(item)
        item["spec"]["template"]["spec"]["tolerationz"] = []
        with pytest.raises(ValueError, match="tolerationz"):
            V1Job.model_validate(item)
    else:
        for replica in item["spec"]["pytorchReplicaSpecs"].values():
            V1PodTemplateSpec.model_validate(replica["template"])


@pytest.mark.parametrize("name", CASES)
def test_pods_keep_to_the_restricted_standard_and_carry_no_token(name: str) -> None:
    for spec in pod_specs(manifest(*CASES[name])):
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "requests" in container["resources"] and "memory" in container["resources"]["limits"]
        assert {"name": "state", "persistentVolumeClaim": {"claimName": "reprise"}} in spec["volumes"]
        assert all("hostPath" not in volume for volume in spec["volumes"])


@pytest.mark.parametrize("name", CASES)
def test_nothing_tolerates_a_disruption_and_nothing_carries_prefects_label(name: str) -> None:
    item = manifest(*CASES[name])
    assert "prefect.io" not in json.dumps(item)
    for spec in pod_specs(item):
        for toleration in spec.get("tolerations", []):
            assert toleration["key"] in (
                "nvidia.com/gpu",
                "node.kubernetes.io/not-ready",
                "node.kubernetes.io/unreachable",
            )
            assert toleration["effect"] in ("NoSchedule", "NoExecute")


def test_the_master_of_several_is_on_on_demand_and_alone_it_is_on_spot() -> None:
    def capacity(workload: Workload) -> dict[str, str]:
        replicas = training_job(workload, PLACE)["spec"]["pytorchReplicaSpecs"]
        return {
            name: r["template"]["spec"]["nodeSelector"]["karpenter.sh/capacity-type"] for name, r in replicas.items()
        }

    assert capacity(SPOT) == {"Master": "on-demand", "Worker": "spot"}
    assert capacity(SLICE) == {"Master": "spot"}
    assert capacity(TRAINING) == {"Master": "on-demand"}
    assert training_job(SPOT, PLACE)["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 3


def test_one_attempt_is_one_object_and_the_operators_budgets_stay_out() -> None:
    item = training_job(SPOT, PLACE)
    assert {r["restartPolicy"] for r in item["spec"]["pytorchReplicaSpecs"].values()} == {"Never"}
    assert not {"backoffLimit", "activeDeadlineSeconds"} & set(item["spec"]["runPolicy"])
    assert item["spec"]["nprocPerNode"] == "8"


def test_the_wrapper_is_done_before_the_kubelet() -> None:
    for seconds, expected in ((90.0, 85.0), (4.0, 3.0), (1.0, 1.0)):
        spec = next(pod_specs(training_job(replace(TRAINING, grace_seconds=seconds), PLACE)))
        command = spec["containers"][0]["command"]
        assert float(command[command.index("--grace") + 1]) == expected <= spec["terminationGracePeriodSeconds"]


def test_a_grace_beyond_the_notice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"grace = 120 s: expected less than the 120 s notice"):
        training_job(replace(SPOT, grace_seconds=120), PLACE)
    training_job(replace(SPOT, grace_seconds=120, spot=False), PLACE)  # on-demand nodes have no notice


@pytest.mark.parametrize(
    "toleration", [{"operator": "Exists"}, {"key": "karpenter.sh/disrupted", "operator": "Exists"}]
)
def test_harmful_tolerations_are_refused(toleration: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="killed without a notice"):
        replace(PLACE, tolerations=(toleration,))


@pytest.mark.parametrize("name", ["Upper", "a_b", "-a", "a-", "1a", "a" * 64, ""])
def test_names_that_kubernetes_would_refuse(name: str) -> None:
    with pytest.raises(GiveUp, match="DNS label"):
        step_job(replace(STEP, name=name), PLACE)


def test_a_trainings_name_leaves_room_for_its_pods() -> None:
    training_job(replace(TRAINING, name="a" * 52), PLACE)
    with pytest.raises(GiveUp, match="at most 52"):
        training_job(replace(TRAINING, name="a" * 53), PLACE)


def test_a_long_request_goes_to_the_state_volume() -> None:
    long = replace(STEP, request={"text": "x" * REQUEST_LIMIT})
    assert request_is_inside(STEP) and not request_is_inside(long)
    item = step_job(long, PLACE)
    assert "/reprise/jobs/register-model-0123456789ab/request.json" in next(pod_specs(item))["containers"][0]["command"]
    assert len(json.dumps(item)) < 10_000


def test_an_image_that_is_not_given() -> None:
    with pytest.raises(ConfigError, match=r"\[images\] train: no image"):
        training_job(TRAINING, ClusterPlace(images={"step": "x"}))


def test_labels_take_any_text() -> None:
    assert label_value("digits/éà: v1.0_") == "digits-----v1.0"
    assert len(label_value("x" * 99)) == 63
    assert label_value("___") == ""


def test_secrets_are_named_and_never_held() -> None:
    text = yaml_of([step_job(STEP, PLACE)])
    assert "secretRef:\n            name: reprise-s3" in text and "secretKeyRef" not in text
