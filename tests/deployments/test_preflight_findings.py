"""What a cluster lacks beside nodes: one change to a sound one gives that row, that fix, and no other row."""

from __future__ import annotations

import pytest

from tests.deployments.preflight_faults import (
    V1,
    V2,
    Change,
    claim,
    denied,
    deployment_args,
    hard,
    limits,
    mlflow,
    on,
    one_row,
    pool,
    replaced,
    used,
    without,
)

# name: change, verdict, what, words of what is found, words of the fix
SNAPSHOTS: dict[str, tuple[Change, str, str, str, str]] = {
    "no CRD": (lambda d: d["apis"].pop(V1), "FAIL", "PyTorchJob", "not defined", "kubectl apply --server-side"),
    "v2 operator only": (
        lambda d: d["apis"].update({V1: [], V2: ["clustertrainingruntimes", "trainjobs"]}),
        "FAIL",
        "PyTorchJob",
        "only Kubeflow Trainer v2",
        "install the Training Operator v1",
    ),
    "CRD of an older version": (
        lambda d: d["apis"].update({"kubeflow.org/v1beta2": d["apis"].pop(V1)}),
        "FAIL",
        "PyTorchJob",
        "in v1beta2 only",
        "upgrade the Training Operator",
    ),
    "operator down": (
        on("operators", "training-operator", lambda o: o["status"].clear()),
        "FAIL",
        "PyTorchJob",
        "no replica available",
        "describe deployment training-operator",
    ),
    "operator without an init template": (
        on(
            "operators",
            "training-operator",
            lambda o: o["spec"]["template"]["spec"]["containers"][0].pop("volumeMounts"),
        ),
        "FAIL",
        "pod security",
        "adds an init container",
        "ConfigMap with initContainer.yaml",
    ),
    "no right to create": (
        denied("kubeflow.org", "pytorchjobs", "create"),
        "FAIL",
        "rights",
        "create pytorchjobs",
        '"verbs": ["create"]',
    ),
    "no right to read logs": (
        denied("", "pods/log", "get"),
        "FAIL",
        "rights",
        "get pods/log",
        '"resources": ["pods/log"]',
    ),
    "no right to read nodes": (denied("", "nodes", "get"), "WARN", "rights", "spot interruption", "ClusterRole"),
    "old server": (lambda d: d.update(version="v1.27.4"), "WARN", "server version", "v1.27.4", "1.29"),
    "clock a minute off": (lambda d: d.update(clock_offset=61.0), "WARN", "clock", "61 s behind", "set-ntp"),
    "clock ten minutes off": (lambda d: d.update(clock_offset=-600.0), "FAIL", "clock", "600 s ahead", "set-ntp"),
    "NodePool grace below the pod's": (
        pool(grace="1m"),
        "WARN",
        "grace",
        "NodePool gpu-spot gives its nodes 60 s",
        "terminationGracePeriod",
    ),
    "quota too small": (
        hard("requests.nvidia.com/gpu", "4"),
        "FAIL",
        "quota",
        "6 requests.nvidia.com/gpu, ResourceQuota",
        "edit resourcequota",
    ),
    "quota spent": (used("requests.nvidia.com/gpu", "6"), "WARN", "quota", "6 are used", "until others have ended"),
    "quota counts CPU limits": (
        hard("limits.cpu", "64"),
        "FAIL",
        "quota",
        "limits.cpu, so that pods without such a limit",
        "requests.cpu",
    ),
    "quota of services": (used("services", "29"), "WARN", "quota", "3 services", "until others"),
    "limit range below memory": (
        limits(max={"memory": "16Gi"}),
        "FAIL",
        "limit range",
        "32Gi memory, LimitRange reprise wants at most 16Gi",
        "limitrange",
    ),
    "limit range with a default CPU limit": (
        limits(default={"cpu": "2"}),
        "FAIL",
        "limit range",
        "default limit of 2: such a pod is invalid",
        "default for cpu",
    ),
    "ReadWriteOnce": (
        claim(accessModes=["ReadWriteOnce"]),
        "FAIL",
        "state claim",
        "3 pods: those on a second node never start",
        "ReadWriteMany",
    ),
    "read only": (claim(accessModes=["ReadOnlyMany"]), "FAIL", "state claim", "cannot be written", "ReadWriteMany"),
    "no claim": (
        without("persistentvolumeclaims", "reprise"),
        "FAIL",
        "state claim",
        "is not in namespace",
        "state_claim",
    ),
    "claim of an unknown class": (
        on(
            "persistentvolumeclaims",
            "reprise",
            lambda c: c.update(
                spec={"accessModes": ["ReadWriteMany"], "storageClassName": "efs"}, status={"phase": "Pending"}
            ),
        ),
        "FAIL",
        "state claim",
        "'efs' does not exist (there are: block, shared)",
        "storageClassName",
    ),
    "claim that is being deleted": (
        on(
            "persistentvolumeclaims",
            "reprise",
            lambda c: c["metadata"].update(deletionTimestamp="2026-11-24T09:00:00Z"),
        ),
        "FAIL",
        "state claim",
        "being deleted",
        "create it anew",
    ),
    "no namespace": (replaced("namespaces", []), "FAIL", "namespace", "does not exist", "kubectl apply -k"),
    "no service account": (
        replaced("serviceaccounts", []),
        "FAIL",
        "service account",
        "reprise-step is not",
        "create serviceaccount",
    ),
    "no priority class": (
        replaced("priorityclasses", []),
        "FAIL",
        "priority class",
        "does not exist",
        "priority_class",
    ),
    "no queue": (replaced("localqueues", []), "FAIL", "queue", "stay suspended", "queue in cluster.toml"),
    "no Secret": (
        without("secrets", "store-credentials"),
        "FAIL",
        "secrets",
        "store-credentials is not",
        "create secret generic",
    ),
    "no pull secret": (without("secrets", "registry"), "WARN", "image pull", "without credentials", "docker-registry"),
    "pull secret of the wrong type": (
        on("secrets", "registry", lambda s: s.update(type="Opaque")),
        "WARN",
        "image pull",
        "type Opaque",
        "docker-registry",
    ),
    "MLflow refuses its Service name": (
        mlflow(403, "Invalid Host header - possible DNS rebinding attack detected"),
        "FAIL",
        "MLflow",
        "refuses its own Service name",
        "--allowed-hosts 'mlflow:5000,mlflow.reprise.svc.cluster.local:5000",
    ),
    "MLflow without allowed hosts, from outside": (
        deployment_args("mlflow", "server"),
        "FAIL",
        "MLflow",
        "has no --allowed-hosts",
        "--allowed-hosts 'mlflow:5000",
    ),
    "MLflow with other allowed hosts": (
        deployment_args("mlflow", "server", "--allowed-hosts=mlflow.example"),
        "FAIL",
        "MLflow",
        "allows mlflow.example",
        "mlflow:5000",
    ),
    "MLflow wants credentials": (mlflow(401, ""), "FAIL", "MLflow", "answers 401", "env_secrets"),
    "MLflow is away": (mlflow(None, "timed out"), "FAIL", "MLflow", "does not answer", "NetworkPolicy"),
    "MLflow has no Service": (
        lambda d: (d["probes"].pop("mlflow"), without("services", "mlflow")(d)),
        "FAIL",
        "MLflow",
        "there is no Service mlflow",
        "MLFLOW_TRACKING_URI",
    ),
    "DVC does not verify": (
        lambda d: d["probes"]["dvc"].update(verify=False),
        "FAIL",
        "DVC remote",
        "tampered",
        "verify true",
    ),
    "nodes may not be listed": (
        lambda d: (d["objects"].pop("nodes"), d["unreadable"].update(nodes="forbidden")),
        "WARN",
        "what can be seen",
        "may not be listed: nodes",
        '"resources": ["nodes"]',
    ),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_one_fault_of_the_cluster_is_one_row_with_its_fix(name: str) -> None:
    one_row(*SNAPSHOTS[name])
