"""Changes to the sound cluster of the preflight's tests, each one fault, and how a row for it is checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from deployments.errors import PreflightError
from deployments.preflight import preflight, refuse
from deployments.preflight_findings import Finding
from deployments.snapshot import Snapshot
from tests.deployments.preflight_kit import broken, named, place, step, training

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


def one_row(change: Change, verdict: str, what: str, found: str, fix: str) -> None:
    """The changed cluster gives this row and no other, and it refuses if it is a FAIL."""
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
