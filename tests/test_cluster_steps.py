"""Steps as Jobs on a real Kubernetes API with real controllers: `KUBECONFIG=... pytest -m cluster`.

The API is any with nodes labelled karpenter.sh/capacity-type, PyTorchJobs, a default ReadWriteMany storage class and
images reprise-step:dev and reprise-train:dev with Python (or those of REPRISE_CLUSTER_IMAGES, a JSON object).
Not covered: trainings (test_cluster_training.py, test_cluster_resume.py), faults of the API (test_cluster_faults.py).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster import Cluster
from deployments.cluster_place import ClusterPlace
from deployments.errors import GiveUp, PreflightError
from deployments.kube_api import KubeApi
from deployments.kube_connect import connect
from deployments.manifests import manifest
from deployments.workload import Resources
from tests.cluster_kit import HANG_ONCE, RESULT, Background, apply, running_pods, step, training

pytestmark = pytest.mark.cluster
TELL = """
import json, sys
n = json.load(open(sys.argv[1]))["n"]
open("/dev/termination-log", "w").write(json.dumps({"ok": True, "n": n}))
"""
FAIL_ONCE = """
import pathlib, sys
mark = pathlib.Path("/reprise/failed-once")
if not mark.exists():
    mark.touch(); sys.exit("broken")
"""


def test_the_server_takes_every_golden_as_it_is(api: KubeApi, place: ClusterPlace) -> None:
    import yaml

    for path in sorted((Path(__file__).parent / "golden").glob("*.yaml")):
        for item in yaml.safe_load_all(path.read_text()):
            item["metadata"]["namespace"] = place.namespace
            plural = {"PodDisruptionBudget": "poddisruptionbudgets"}.get(item["kind"], item["kind"].lower() + "s")
            version = item["apiVersion"]
            root = f"/{'apis' if '/' in version else 'api'}/{version}/namespaces/{place.namespace}/{plural}"
            made = api.request("POST", root, query={"dryRun": "All", "fieldValidation": "Strict"}, body=item)
            assert made["metadata"]["name"] == item["metadata"]["name"]


def test_a_step(cluster: Cluster) -> None:
    lines: list[str] = []
    outcome = cluster.run(step("a-step", RESULT, "{result}"), on_line=lines.append)
    assert (outcome.cause, outcome.exit_code, outcome.adopted) == ("complete", 0, False)
    assert lines == ["hello"] and outcome.node
    if cluster.state is not None:
        assert outcome.result == {"ok": True, "result": 7}
        assert Path(outcome.log).read_text() == "hello\n"
    assert cluster.run(step("a-step", RESULT, "{result}")).adopted
    assert list(cluster.logs("a-step")) == ["hello"]
    with pytest.raises(GiveUp, match="expected other"):
        cluster.run(step("a-step", RESULT, labels={"key": "other"}))


def test_a_step_reads_its_request_and_tells_by_termination_message(cluster: Cluster) -> None:
    blind = Cluster(cluster.settings, api=cluster.api)
    blind.state = None  # as from a machine without the volume
    outcome = blind.run(step("by-message", TELL, "{request}", request={"n": 41, "text": "é\n$(HOME) {x}"}))
    assert outcome.result == {"ok": True, "n": 41}
    blind.close()


def test_a_failed_step_is_started_anew(cluster: Cluster) -> None:
    first = cluster.run(step("again", FAIL_ONCE))
    assert (first.cause, first.exit_code) == ("user_error", 1) and "broken" in first.reason
    second = cluster.run(step("again", FAIL_ONCE))
    assert (second.cause, second.adopted) == ("complete", False)


def test_an_image_that_is_nowhere(cluster: Cluster, place: ClusterPlace) -> None:
    broken = Cluster(
        ClusterPlace(namespace=place.namespace, images={"step": "nowhere.invalid/x:1"}),
        api=cluster.api,
        start_patience=2.0,
    )
    with pytest.raises(PreflightError, match=r"nowhere.invalid/x:1 cannot be pulled"):
        broken.run(step("no-image", RESULT))
    there = broken.api.find(broken.object_path("step", "no-image"))
    assert there is None or there["metadata"]["deletionTimestamp"]
    broken.close()


def test_a_step_that_fits_nowhere(cluster: Cluster, place: ClusterPlace) -> None:
    wanted = step("too-big", RESULT, resources=Resources(cpus=10_000, memory="1Gi"), start_seconds=7.0)
    with pytest.raises(PreflightError, match="a pod asks for 10000 cpu"):
        cluster.run(wanted)
    assert cluster.api.find(cluster.object_path("step", "too-big")) is None
    unguarded = Cluster(place, api=cluster.api, guard=False)
    lines: list[str] = []
    outcome = unguarded.run(wanted, on_line=lines.append)
    unguarded.close()
    assert outcome.cause == "no_capacity" and "Insufficient cpu" in outcome.reason
    assert any("waiting: no node fits" in line for line in lines)


def test_out_of_memory(cluster: Cluster) -> None:
    wanted = step("too-much", "x = bytearray(300 << 20); print(len(x))", resources=Resources(cpus=0.05, memory="40Mi"))
    outcome = cluster.run(wanted)
    assert (outcome.cause, outcome.exit_code) == ("out_of_memory", 137), outcome.reason


def test_deadline_and_stop(cluster: Cluster) -> None:
    sleep = "import time; print('up', flush=True); time.sleep(300)"
    outcome = cluster.run(step("late", sleep, deadline_seconds=3.0, grace_seconds=1.0))
    assert outcome.cause == "deadline" and running_pods(cluster, "late") == []
    run = Background(cluster, step("stopped", sleep, grace_seconds=20.0))
    run.until_line("up")
    began = time.monotonic()
    cluster.stop("stopped", grace_seconds=1)
    assert time.monotonic() - began < 15 and running_pods(cluster, "stopped") == []
    assert run.end().cause == "cancelled"
    cluster.stop("stopped")


def test_an_evicted_step_starts_again_in_the_same_job(cluster: Cluster) -> None:
    run = Background(cluster, step("evicted", HANG_ONCE, "/reprise/evicted", grace_seconds=1.0))
    run.until_line("up False")
    pod = running_pods(cluster, "evicted")[0]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
    cluster.api.request("POST", f"{cluster.pod_path(pod)}/eviction", body=eviction)
    outcome = run.end()
    assert outcome.cause == "complete" and any("up True" in line for line in run.lines)


def test_a_suspended_job_waits(cluster: Cluster) -> None:
    wanted = step("held", RESULT, "{result}")
    item = manifest(wanted, cluster.settings)
    item["spec"]["suspend"] = True
    path = cluster.object_path("step", "held")
    cluster.api.request("POST", cluster.object_path("step", ""), body=item)
    run = Background(cluster, wanted)
    run.until_line("suspended")
    cluster.api.request("PATCH", path, body={"spec": {"suspend": False}}, content_type="application/merge-patch+json")
    assert run.end().cause == "complete"


def test_least_privilege_is_enough_and_less_is_told(cluster: Cluster, place: ClusterPlace, tmp_path: Path) -> None:
    """The Role that a flow's pod needs to run steps and trainings; nodes cannot be read, and nothing else either."""
    namespace, rbac = place.namespace, f"/apis/rbac.authorization.k8s.io/v1/namespaces/{place.namespace}"
    token = role(cluster.api, namespace, rbac, RULES)
    mine = Cluster(place, api=as_account(cluster.api, token, tmp_path), state=cluster.state)
    outcome = mine.run(step("by-role", RESULT, "{result}"))
    assert outcome.cause == "complete" and outcome.capacity == "on-demand"
    assert mine.run(training("train-role-1", "role", 2)).cause == "complete"
    mine.stop("by-role")
    role(cluster.api, namespace, rbac, [rule for rule in RULES if "jobs" not in rule["resources"]])
    with pytest.raises(PreflightError, match=r'"resources": \["jobs"\], "verbs": \["(list|create)"\]'):
        Cluster(place, api=as_account(cluster.api, token, tmp_path)).run(step("no-role", RESULT))
    mine.close()


RULES: list[dict[str, Any]] = [
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "list", "watch", "patch", "delete"]},
    {
        "apiGroups": ["kubeflow.org"],
        "resources": ["pytorchjobs"],
        "verbs": ["create", "get", "list", "watch", "patch", "delete"],
    },
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "delete"]},
    {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["list"]},
]


def role(api: KubeApi, namespace: str, rbac: str, rules: list[dict[str, Any]]) -> str:
    """An account with these rules; returns a token of it."""
    meta = {"name": "flow", "namespace": namespace}
    version = {"apiVersion": "rbac.authorization.k8s.io/v1"}
    apply(api, f"/api/v1/namespaces/{namespace}/serviceaccounts", {"kind": "ServiceAccount", "metadata": meta})
    apply(api, f"{rbac}/roles", {**version, "kind": "Role", "metadata": meta, "rules": rules})
    subject = {"kind": "ServiceAccount", **meta}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "flow"}
    binding = {**version, "kind": "RoleBinding", "metadata": meta, "subjects": [subject], "roleRef": reference}
    apply(api, f"{rbac}/rolebindings", binding)
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/flow/token"
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    return str(api.request("POST", path, body=asked)["status"]["token"])


def as_account(api: KubeApi, token: str, folder: Path) -> KubeApi:
    """The same API server, asked with a token."""
    import yaml

    path = folder / "account.kubeconfig"
    document = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    document["users"] = [{"name": user["name"], "user": {"token": token}} for user in document["users"]]
    path.write_text(yaml.safe_dump(document))
    return connect(kubeconfig=str(path))
