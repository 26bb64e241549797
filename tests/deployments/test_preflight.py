"""Each fault alone: one change to a sound cluster or a sound manifest gives that row, that fix, and no other row."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from deployments.errors import PreflightError
from deployments.manifests import manifest
from deployments.preflight import preflight, refuse
from deployments.preflight_findings import Finding
from deployments.snapshot import Snapshot
from tests.deployments.preflight_kit import SOUND, broken, named, place, sound, step, training

Document = dict[str, Any]
Change = Callable[[Document], object]
GPU_NODES = ("gpu-od-0", "gpu-spot-0", "gpu-spot-1")
SPOT_NODES = GPU_NODES[1:]


def faults(findings: list[Finding]) -> list[Finding]:
    return [f for f in findings if f.verdict != "OK"]


def judged(document: Document) -> list[Finding]:
    return faults(preflight(Snapshot.from_json(json.dumps(document)), [training(), step()], place()))


def objects(plural: str) -> Callable[[Document], list[Document]]:
    return lambda document: document["objects"][plural]


def nodes(*names: str, change: Change) -> Change:
    def apply(document: Document) -> None:
        for name in names:
            change(named(document, "nodes", name))

    return apply


def taint(key: str, effect: str = "NoSchedule") -> Change:
    return lambda node: node["spec"].setdefault("taints", []).append({"key": key, "value": "true", "effect": effect})


def label(**labels: str) -> Change:
    return lambda node: node["metadata"]["labels"].update(
        {k.replace("__", "/").replace("_", "-"): v for k, v in labels.items()}
    )


def resource(old: str, new: str) -> Change:
    def apply(node: Document) -> None:
        allocatable = node["status"]["allocatable"]
        allocatable[new] = allocatable.pop(old)

    return apply


def allocate(**values: str) -> Change:
    return lambda node: node["status"]["allocatable"].update(values)


def replaced(plural: str, items: list[Document]) -> Change:
    return lambda document: document["objects"].update({plural: items})


def without(plural: str, name: str) -> Change:
    return lambda document: document["objects"][plural].remove(named(document, plural, name))


def on(plural: str, name: str, change: Change) -> Change:
    return lambda document: change(named(document, plural, name))


def denied(group: str, name: str, verb: str) -> Change:
    def apply(document: Document) -> None:
        for answer in document["access"]:
            if (answer["group"], answer["resource"], answer["verb"]) == (group, name, verb):
                answer["allowed"] = False

    return apply


def hard(resource: str, value: str) -> Change:
    return on("resourcequotas", "reprise", lambda q: q["status"]["hard"].update({resource: value}))


def used(resource: str, value: str) -> Change:
    return on("resourcequotas", "reprise", lambda q: q["status"]["used"].update({resource: value}))


def limits(**bounds: Any) -> Change:
    return on("limitranges", "reprise", lambda r: r["spec"]["limits"][0].update(bounds))


def claim(**spec: Any) -> Change:
    return on("persistentvolumeclaims", "reprise", lambda c: c["spec"].update(spec))


def mlflow(status: int | None, body: str) -> Change:
    return lambda d: d["probes"].update({"mlflow": {"url": "http://mlflow:5000", "status": status, "body": body}})


def deployment_args(*args: str) -> Change:
    """MLflow's Deployment, looked at from outside: nobody asked MLflow itself."""

    def apply(document: Document) -> None:
        del document["probes"]["mlflow"]
        named(document, "deployments", "mlflow")["spec"]["template"]["spec"]["containers"][0]["args"] = list(args)

    return apply


def slice_time(node: Document) -> None:
    node["metadata"]["labels"] |= {"nvidia.com/gpu.replicas": "4", "nvidia.com/gpu.sharing-strategy": "time-slicing"}
    node["status"]["allocatable"]["nvidia.com/gpu"] = "16"


def not_ready(node: Document) -> None:
    node["status"]["conditions"] = [{"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}]
    node["spec"].setdefault("taints", []).append({"key": "node.kubernetes.io/unreachable", "effect": "NoSchedule"})


def busy(document: Document) -> None:
    for node in SPOT_NODES:
        requests = {"cpu": "1", "memory": "1Gi", "nvidia.com/gpu": "3"}
        document["objects"]["pods"].append(
            {
                "metadata": {"name": f"sweep-{node}", "namespace": "research"},
                "spec": {"nodeName": node, "containers": [{"name": "main", "resources": {"requests": requests}}]},
                "status": {"phase": "Running"},
            }
        )


def pool(*, taints: tuple[str, ...] = (), limit: str = "16", used: str = "0", grace: str = "120s") -> Change:
    """No spot node left: Karpenter makes them."""

    def apply(document: Document) -> None:
        for node in SPOT_NODES:
            document["objects"]["nodes"].remove(named(document, "nodes", node))
        keys = ("nvidia.com/gpu", *taints)
        spec = {
            "terminationGracePeriod": grace,
            "requirements": [
                {"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["spot"]},
                {"key": "karpenter.k8s.aws/instance-category", "operator": "In", "values": ["g", "p"]},
            ],
            "taints": [{"key": key, "value": "true", "effect": "NoSchedule"} for key in keys],
        }
        document["objects"]["nodepools"].append(
            {
                "metadata": {"name": "gpu-spot"},
                "spec": {
                    "limits": {"nvidia.com/gpu": limit},
                    "template": {"metadata": {"labels": {"accelerator": "nvidia-a100"}}, "spec": spec},
                },
                "status": {"resources": {"nvidia.com/gpu": used}, "conditions": [{"type": "Ready", "status": "True"}]},
            }
        )

    return apply


V1, V2 = "kubeflow.org/v1", "trainer.kubeflow.org/v1alpha1"
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
    "missing toleration": (
        nodes(*GPU_NODES, change=taint("team")),
        "FAIL",
        "taints",
        "taint team=true:NoSchedule",
        'key = "team"',
    ),
    "wrong selector": (
        nodes(*GPU_NODES, change=label(accelerator="nvidia-h100")),
        "FAIL",
        "node selector",
        "accelerator=nvidia-a100",
        "kubectl label node",
    ),
    "no spot nodes": (
        nodes(
            *SPOT_NODES, change=lambda n: n["metadata"]["labels"].update({"karpenter.sh/capacity-type": "on-demand"})
        ),
        "FAIL",
        "node selector",
        "karpenter.sh/capacity-type=spot",
        "correct the selector",
    ),
    "MIG name": (
        nodes(*GPU_NODES, change=resource("nvidia.com/gpu", "nvidia.com/mig-1g.10gb")),
        "FAIL",
        "resources",
        "no node has nvidia.com/gpu",
        'gpu_resource = "nvidia.com/mig-1g.10gb"',
    ),
    "renamed shares": (
        nodes(*GPU_NODES, change=resource("nvidia.com/gpu", "nvidia.com/gpu.shared")),
        "FAIL",
        "resources",
        "nvidia.com/gpu.shared",
        'gpu_resource = "nvidia.com/gpu.shared"',
    ),
    "no device plugin": (
        nodes(*GPU_NODES, change=lambda n: n["status"]["allocatable"].pop("nvidia.com/gpu")),
        "FAIL",
        "resources",
        "nor any other device",
        "device plugin",
    ),
    "time slicing, two asked for": (
        nodes(*GPU_NODES, change=slice_time),
        "FAIL",
        "time slicing",
        "one and the same GPU",
        "gpus = 1",
    ),
    "one GPU a node": (
        nodes(*GPU_NODES, change=allocate(**{"nvidia.com/gpu": "1"})),
        "FAIL",
        "resources",
        "2 nvidia.com/gpu, and node gpu-od-0 gives 1",
        "ask for less",
    ),
    "too little memory": (
        nodes(*GPU_NODES, change=allocate(memory="16Gi")),
        "FAIL",
        "resources",
        "32Gi memory",
        "ask for less",
    ),
    "too few nodes for all": (
        nodes(*SPOT_NODES, change=allocate(**{"nvidia.com/gpu": "2", "cpu": "7"})),
        "FAIL",
        "resources",
        "8 cpu",
        "larger nodes",
    ),
    "one spot node": (
        lambda d: (
            without("nodes", "gpu-spot-1")(d),
            nodes("gpu-spot-0", change=allocate(**{"nvidia.com/gpu": "2"}))(d),
        ),
        "FAIL",
        "nodes",
        "needs 2 pods at once (2 x worker), and all nodes that suit take 1",
        "add nodes",
    ),
    "cordoned nodes": (
        nodes(*SPOT_NODES, change=lambda n: n["spec"].update(unschedulable=True)),
        "FAIL",
        "cordoned nodes",
        "gpu-spot-0 is cordoned (and 1 more alike)",
        "kubectl uncordon gpu-spot-0",
    ),
    "nodes that do not answer": (
        nodes(*SPOT_NODES, change=not_ready),
        "WARN",
        "nodes",
        "not ready (NodeStatusUnknown)",
        "kubectl describe node",
    ),
    "GPUs in use": (busy, "WARN", "free capacity", "research/sweep-gpu-spot-0 (3)", "waits until others have ended"),
    "NodePool with another taint": (
        pool(taints=("dedicated",)),
        "FAIL",
        "taints",
        "NodePool gpu-spot has taint dedicated",
        'key = "dedicated"',
    ),
    "NodePool limit too small": (pool(limit="2"), "FAIL", "NodePool limits", "may have 2", "raise spec.limits"),
    "NodePool limit reached": (pool(used="14"), "WARN", "NodePool limits", "14 are in use", "wait until"),
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
    "volume in another zone": (
        on(
            "persistentvolumes",
            "pvc-1",
            lambda v: v["spec"].update(
                nodeAffinity={
                    "required": {
                        "nodeSelectorTerms": [
                            {
                                "matchExpressions": [
                                    {"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["eu-1b"]}
                                ]
                            }
                        ]
                    }
                }
            ),
        ),
        "FAIL",
        "storage zone",
        "cannot be reached from node",
        "shared file system",
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


def test_a_sound_cluster_is_silent() -> None:
    findings = preflight(Snapshot.read(SOUND), [training(), step()], place())
    assert faults(findings) == []
    assert {f.what for f in findings} >= {"PyTorchJob", "rights", "place", "quota", "state claim", "grace", "MLflow"}
    refuse(findings)


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_one_fault_of_the_cluster_is_one_row_with_its_fix(name: str) -> None:
    change, verdict, what, found, fix = SNAPSHOTS[name]
    rows = faults(preflight(broken(change), [training(), step()], place()))
    assert [(r.verdict, r.what) for r in rows] == [(verdict, what)], rows
    assert found in rows[0].found, rows[0]
    assert fix in rows[0].fix, rows[0]
    if verdict == "FAIL":
        with pytest.raises(PreflightError) as refused:
            refuse(rows)
        assert refused.value.exit_code == 3
        assert rows[0].fix in str(refused.value)
    else:
        refuse(rows)


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


def test_a_pool_from_zero_is_a_place() -> None:
    assert faults(preflight(broken(pool()), [training()], place())) == []


def test_a_workload_that_runs_already_is_not_refused_for_what_it_holds_itself() -> None:
    document = sound()
    for node, count in (("gpu-od-0", 1), ("gpu-spot-0", 1), ("gpu-spot-1", 1)):
        document["objects"]["pods"] += [
            {
                "metadata": {
                    "name": f"train-{node}",
                    "namespace": "reprise",
                    "labels": {"reprise.dev/workload": training().name},
                },
                "spec": {"nodeName": node, "containers": [{"resources": {"requests": {"nvidia.com/gpu": "3"}}}]},
                "status": {"phase": "Running"},
            }
        ] * count
    used("requests.nvidia.com/gpu", "8")(document)
    assert judged(document) == []


def test_two_faults_are_two_rows() -> None:
    document = sound()
    document["apis"].pop(V1)
    document["clock_offset"] = 30.0
    assert [r.what for r in judged(document)] == ["clock", "PyTorchJob"]


def test_a_step_needs_no_operator() -> None:
    document = sound()
    document["apis"].pop(V1)
    assert faults(preflight(Snapshot.from_json(json.dumps(document)), [step()], place())) == []
