"""What a real API server says of one's rights and of objects in a dry run, as the preflight tells it.

    KUBECONFIG=... pytest -m cluster tests/test_preflight_cluster_rights.py

Not covered: places and admission (test_preflight_cluster.py).
"""

from __future__ import annotations

import time

import pytest

from deployments.cluster_place import ClusterPlace
from deployments.dry_run import dry_run
from deployments.kube_api import KubeApi
from deployments.kube_connect import connect
from deployments.manifests import manifest
from deployments.preflight import preflight
from deployments.snapshot_take import take
from tests.preflight_cluster_kit import make, training

pytestmark = pytest.mark.cluster


def test_a_dry_run_tells_what_the_server_takes_and_makes_nothing(api: KubeApi, strict_place: ClusterPlace) -> None:
    good = manifest(training(image="step", name="dry-1"), strict_place)
    unknown = manifest(training(image="step", name="dry-2"), strict_place)
    unknown["spec"]["paralelism"] = 1
    elsewhere = {**good, "metadata": {**good["metadata"], "namespace": "no-such-namespace"}}
    undefined = {"apiVersion": "example.com/v1", "kind": "Nothing", "metadata": good["metadata"]}
    found = list(dry_run(api, [good, unknown, elsewhere, undefined]))
    assert [f.verdict for f in found] == ["OK", "FAIL", "FAIL", "FAIL"]
    assert 'unknown field "spec.paralelism"' in found[1].found
    assert "not found" in found[2].found and "make namespace no-such-namespace" in found[2].fix
    assert found[3].found == "Nothing of example.com/v1 is not defined on this cluster"
    assert api.get(f"/apis/batch/v1/namespaces/{strict_place.namespace}/jobs")["items"] == []


def test_rights_are_what_the_server_says(api: KubeApi, strict_place: ClusterPlace) -> None:
    snapshot = take(api, strict_place)
    assert snapshot.access and all(a["allowed"] for a in snapshot.access)  # an administrator's kubeconfig
    assert not snapshot.unreadable
    assert snapshot.clock_offset is not None and abs(snapshot.clock_offset) < 2


def test_the_rights_of_a_limited_account_are_told_as_they_are(api: KubeApi, strict_place: ClusterPlace) -> None:
    """A real service account with a Role that lacks one verb; `take` runs with its token."""
    here = f"/namespaces/{strict_place.namespace}"
    make(api, f"/api/v1{here}/serviceaccounts", {"kind": "ServiceAccount", "metadata": {"name": "flow"}})
    rules = [
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list", "watch", "create", "patch", "delete"]},
        {
            "apiGroups": ["kubeflow.org"],
            "resources": ["pytorchjobs"],
            "verbs": ["get", "list", "watch", "patch", "delete"],
        },
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "delete"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["events"], "verbs": ["list"]},
    ]
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    make(api, f"{rbac}{here}/roles", {"kind": "Role", "metadata": {"name": "flow"}, "rules": rules})
    binding = {
        "kind": "RoleBinding",
        "metadata": {"name": "flow"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "flow"},
        "subjects": [{"kind": "ServiceAccount", "name": "flow", "namespace": strict_place.namespace}],
    }
    make(api, f"{rbac}{here}/rolebindings", binding)
    request = {"kind": "TokenRequest", "spec": {"expirationSeconds": 600}}
    body = {"apiVersion": "authentication.k8s.io/v1", **request}
    token = api.request("POST", f"/api/v1{here}/serviceaccounts/flow/token", body=body)["status"]["token"]
    limited = connect()
    configuration = limited.client.configuration
    # The client renews its token by this hook; a fixed one takes its place.
    configuration.refresh_api_key_hook = None
    configuration.api_key = {"BearerToken": f"Bearer {token}", "authorization": f"Bearer {token}"}
    try:
        until = time.monotonic() + 20
        while True:  # the authorizer sees a new binding a moment later
            snapshot = take(limited, strict_place)
            if any(a["allowed"] for a in snapshot.access):
                break
            assert time.monotonic() < until
            time.sleep(0.2)
    finally:
        limited.close()
    assert [(a["resource"], a["verb"]) for a in snapshot.access if not a["allowed"]] == [
        ("nodes", "get"),
        ("nodes", "list"),
        ("pytorchjobs", "create"),
    ]
    assert {"nodes", "pods"} <= set(snapshot.unreadable)
    found = [f for f in preflight(snapshot, [training()], strict_place) if f.what == "rights"]
    assert [(f.verdict, "create pytorchjobs" in f.found) for f in found] == [("FAIL", True), ("WARN", False)]
    assert '"verbs": ["create"]' in found[0].fix
