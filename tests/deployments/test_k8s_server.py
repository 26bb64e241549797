"""A real API server takes every object, strictly, and admits our pods: `KUBECONFIG=... pytest -m cluster`."""

from __future__ import annotations

import json
import os
import re
import time

import pytest
import yaml

from deployments.cluster_place import ClusterPlace
from deployments.errors import GiveUp, PreflightError, Unreachable
from deployments.kube_api import MERGE_PATCH, ApiStatus
from deployments.kube_connect import connect
from deployments.manifests import step_job, training_job
from deployments.serving_manifests import Serving, serving_deployment, serving_objects
from deployments.workload import Resources, Workload
from tests.deployments.k8s_kit import (
    K8S,
    NAMESPACES,
    OVERLAYS,
    WORKLOADS,
    build,
    flow_pod,
    needs_kubectl,
    of_kind,
    pool_variables,
    raw,
)


@pytest.mark.cluster
@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_server_accepts_every_object(overlay: str) -> None:
    """A dry run of each object with fieldValidation=Strict: a field that is not known is an error, not a warning.

    Makes the namespaces for real, because a dry run needs them. Kinds that the server does not have are told.
    """
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


@pytest.mark.cluster
@needs_kubectl
def test_pod_security_admits_every_pod_that_lives_long() -> None:
    """Prefect, its worker, MLflow, PostgreSQL, run metrics, triggers: each in its namespace, a dry run (made above)."""
    api, asked = connect(), set()
    for account in [a for overlay in OVERLAYS for a in of_kind(build(overlay), "ServiceAccount")]:
        path = f"/api/v1/namespaces/{account['metadata']['namespace']}/serviceaccounts"
        try:
            api.request("POST", path, body=account)
        except ApiStatus as status:
            assert status.code == 409
    for overlay in OVERLAYS:
        for item in of_kind(build(overlay), *WORKLOADS):
            name, namespace = item["metadata"]["name"], item["metadata"]["namespace"]
            if name in asked or namespace not in NAMESPACES:
                continue
            asked.add(name)
            template = item["spec"]["template"]
            own = [claim["metadata"]["name"] for claim in item["spec"].get("volumeClaimTemplates", [])]
            volumes = [{"name": n, "persistentVolumeClaim": {"claimName": n}} for n in own]
            spec = {**template["spec"], "restartPolicy": "Never"}
            spec["volumes"] = [*spec.get("volumes", []), *volumes]
            spec.pop("priorityClassName", None)  # of the overlay, which is only tried here
            metadata = {"name": f"try-{name}", "labels": template["metadata"]["labels"]}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
            query = {"dryRun": "All", "fieldValidation": "Strict"}
            api.request("POST", f"/api/v1/namespaces/{namespace}/pods", query=query, body=pod)
    api.close()
    assert {"prefect-server", "prefect-worker", "mlflow"} <= asked


@pytest.mark.cluster
def test_an_account_of_a_pod_can_do_what_its_role_says_and_nothing_else() -> None:
    """Real tokens of the accounts, in the namespace `reprise` of an overlay that is applied."""
    api = connect()
    if api.find("/api/v1/namespaces/reprise/serviceaccounts/reprise-deploy") is None or not api.find(
        "/apis/rbac.authorization.k8s.io/v1/namespaces/reprise/roles/reprise-flow"
    ):
        api.close()
        pytest.skip("no overlay is applied: kubectl apply --server-side -k deployments/k8s/overlays/kind")
    here = "/namespaces/reprise"
    asks = {
        "pods": ("GET", f"/api/v1{here}/pods", None),
        "secrets": ("GET", f"/api/v1{here}/secrets", None),
        "nodes": ("GET", "/api/v1/nodes", None),
        "make a job": ("POST", f"/apis/batch/v1{here}/jobs", {"metadata": {"name": "x"}}),
        "make a pod": ("POST", f"/api/v1{here}/pods", {"metadata": {"name": "x"}}),
        "deployments": ("GET", f"/apis/apps/v1{here}/deployments/none", None),
    }
    allowed = {
        "reprise-step": set(),
        "reprise-serve": set(),
        "default": set(),
        "reprise-deploy": {"pods", "deployments"},
        "reprise-flow": {"pods", "nodes", "make a job", "deployments"},
    }
    for account, may in allowed.items():
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 600}}
        token = api.request("POST", f"/api/v1{here}/serviceaccounts/{account}/token", body=body)["status"]["token"]
        as_pod = connect()
        configuration = as_pod.client.configuration
        configuration.cert_file = configuration.key_file = None
        as_pod.client.rest_client = type(as_pod.client.rest_client)(configuration)
        configuration.refresh_api_key_hook = None
        configuration.api_key = {"BearerToken": f"Bearer {token}", "authorization": f"Bearer {token}"}
        found = set()
        for name, (method, path, item) in asks.items():
            query = {"dryRun": "All"} if method == "POST" else {}
            try:
                as_pod.request(method, path, query=query, body=item)
            except PreflightError as error:
                assert "forbids it" in str(error), error
                continue
            except (ApiStatus, GiveUp):  # past the rights: not found, not valid, no quota
                pass
            found.add(name)
        as_pod.close()
        assert found == may, account
    api.close()


@pytest.mark.cluster
def test_a_disruption_budget_lets_one_served_pod_go_at_a_time() -> None:
    """Two ready pods of a served model: the API server evicts the first and refuses the second (429)."""
    api, name = connect(), f"reprise-pdb-{os.getpid()}"
    place = ClusterPlace(namespace=name, images={"serve": "reprise-serve:dev"})
    serving = Serving(
        pipeline="digits", version="1", label="1.x", mar="/m.mar", sha256="0", golden="/h.jsonl", replicas=2
    )
    _, budget, deployment = serving_objects(serving, place)
    api.request(
        "POST", "/api/v1/namespaces", body={"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    )
    try:
        root = f"/api/v1/namespaces/{name}"
        api.request("POST", f"/apis/policy/v1/namespaces/{name}/poddisruptionbudgets", body=budget)
        deployment["spec"]["template"]["spec"] = {
            "nodeSelector": {"reprise.dev/nowhere": "true"},  # no kubelet of this cluster takes them
            "containers": [{"name": "c", "image": "c"}],
            "automountServiceAccountToken": False,
        }
        api.request("POST", f"/apis/apps/v1/namespaces/{name}/deployments", body=deployment)
        until = time.monotonic() + 30
        while len(pods := api.get(f"{root}/pods")["items"]) < 2:
            assert time.monotonic() < until
            time.sleep(0.1)
        ready = {"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}}
        for pod in pods:
            path = f"{root}/pods/{pod['metadata']['name']}/status"
            api.request("PATCH", path, body=ready, content_type=MERGE_PATCH)
        path = f"/apis/policy/v1/namespaces/{name}/poddisruptionbudgets/{budget['metadata']['name']}"
        while (api.get(path).get("status") or {}).get("disruptionsAllowed") != 1:
            assert time.monotonic() < until, api.get(path)
            time.sleep(0.1)
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction"}
        first, second = (p["metadata"]["name"] for p in pods)
        api.request("POST", f"{root}/pods/{first}/eviction", body={**eviction, "metadata": {"name": first}})
        with pytest.raises(Unreachable, match="disruption budget"):
            body = {**eviction, "metadata": {"name": second}}
            api.request("POST", f"{root}/pods/{second}/eviction", body=body, patience=0.0)
    finally:
        api.delete(f"/api/v1/namespaces/{name}")
        api.close()
