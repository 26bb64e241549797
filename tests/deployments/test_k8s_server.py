"""A real API server takes every object, strictly, and admits our pods: `KUBECONFIG=... pytest -m cluster`."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from deployments.manifests import ClusterPlace, step_job, training_job
from deployments.serving_manifests import Serving, serving_deployment
from deployments.workload import Resources, Workload
from tests.deployments.k8s_kit import (
    K8S,
    OVERLAYS,
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
