"""Every pod is `restricted`, bounded, and speaks to servers under the names that they answer to."""

from __future__ import annotations

import re

import pytest
import yaml

from deployments.cluster_place import ClusterPlace
from tests.deployments.k8s_kit import (
    K8S,
    OVERLAYS,
    Json,
    against_restricted,
    all_pods,
    containers,
    flow_pod,
    of_kind,
    pods,
    pool_variables,
    raw,
)


@pytest.mark.parametrize(("name", "spec"), all_pods(), ids=lambda v: v if isinstance(v, str) else "")
def test_every_pod_is_restricted_and_bounded(name: str, spec: Json) -> None:
    assert list(against_restricted(spec)) == []
    assert spec["enableServiceLinks"] is False, "a Service named prefect or mlflow would set PREFECT_PORT, MLFLOW_PORT"
    for container in containers(spec):
        asked = container["resources"]
        assert {"cpu", "memory"} <= set(asked["requests"]), name
        assert "memory" in asked["limits"], name
        assert "cpu" not in asked["limits"], f"{name}: a CPU limit throttles while the node is idle"


def test_the_check_of_restricted_finds_what_it_should() -> None:
    spec = flow_pod()
    assert list(against_restricted({**spec, "securityContext": {}})) == ["runAsNonRoot", "seccompProfile"]
    assert list(against_restricted({**spec, "volumes": [{"name": "x", "hostPath": {}}]})) == ["volume x"]
    bare = {**spec, "containers": [{"name": "c"}]}
    assert list(against_restricted(bare)) == ["c: allowPrivilegeEscalation", "c: capabilities"]


def test_the_operators_init_container_is_restricted_too() -> None:
    text = (K8S / "components" / "training-operator" / "operator" / "initContainer.yaml").read_text()
    for blank, value in {"InitContainerImage": "alpine", "MaxTries": "100", "MasterAddr": "train-0"}.items():
        assert f"{{{{.{blank}}}}}" in text
        text = text.replace(f"{{{{.{blank}}}}}", value)
    (container,) = yaml.safe_load(text)
    pod = {"securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}}
    assert list(against_restricted({**pod, "containers": [container]})) == []
    # html/template, which the operator uses, turns these signs into entities inside of values.
    assert not set("<>&") & set(yaml.safe_load(text)[0]["command"][2].replace("&&", ""))


def test_servers_write_only_to_volumes() -> None:
    for name, spec in pods(raw("spot")):
        for container in containers(spec):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
            mounted = {m["name"] for m in container["volumeMounts"]}
            assert mounted <= {v["name"] for v in spec["volumes"]} | {"data"}, name


def test_secrets_are_named_and_never_written() -> None:
    for overlay in OVERLAYS:
        assert of_kind(raw(overlay), "Secret") == []
        for name, spec in pods(raw(overlay)):
            for container in containers(spec):
                for entry in container.get("env", []):
                    if re.search(r"PASSWORD|AUTH_STRING$|CONNECTION_URL|STORE_URI", entry["name"]):
                        assert "secretKeyRef" in entry["valueFrom"], f"{name}: {entry['name']}"


def test_what_runs_ask_for_is_there() -> None:
    place, objects = ClusterPlace(images={}), raw("kind")
    (claim,) = [c for c in of_kind(objects, "PersistentVolumeClaim") if c["metadata"]["name"] == place.state_claim]
    assert claim["metadata"]["namespace"] == place.namespace
    names = {a["metadata"]["name"] for a in of_kind(objects, "ServiceAccount")}
    assert {place.service_account, place.serving_account, place.deploy_account, "reprise-flow"} <= names
    flow = flow_pod()
    assert flow["securityContext"]["runAsUser"] == flow["securityContext"]["fsGroup"] == place.user
    (mount,) = [m for m in flow["containers"][0]["volumeMounts"] if m["name"] == "state"]
    assert mount["mountPath"] == "{{ state_mount }}"
    assert pool_variables()["state_mount"]["default"] == place.state_mount


def test_prefect_is_not_open() -> None:
    (server,) = [i for i in of_kind(raw("kind"), "Deployment") if i["metadata"]["name"] == "prefect-server"]
    env = {e["name"]: e for e in server["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["PREFECT_SERVER_API_AUTH_STRING"]["valueFrom"]["secretKeyRef"]["name"] == "prefect-auth"
    for overlay in OVERLAYS:
        settings = yaml.safe_load((K8S / "overlays" / overlay / "settings.yaml").read_text())["data"]
        assert "*" not in settings["prefectOrigins"]
        assert "*" not in settings["mlflowHosts"]


def test_mlflow_answers_to_the_names_that_are_used() -> None:
    flow_env = {e["name"]: e["value"] for e in flow_pod()["containers"][0]["env"]}
    host = flow_env["MLFLOW_TRACKING_URI"].removeprefix("http://")
    (server,) = [i for i in of_kind(raw("kind"), "Deployment") if i["metadata"]["name"] == "mlflow"]
    container = server["spec"]["template"]["spec"]["containers"][0]
    probe = container["readinessProbe"]["httpGet"]
    assert {h["name"]: h["value"] for h in probe["httpHeaders"]} == {"Host": host}
    assert probe["path"].startswith("/api/"), "/health is 200 to names that are refused"
    for overlay in OVERLAYS:
        settings = yaml.safe_load((K8S / "overlays" / overlay / "settings.yaml").read_text())["data"]
        assert host in settings["mlflowHosts"].split(",")
