"""The preflight as a whole: silent on a sound cluster, and what it makes of several faults and workloads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.preflight import preflight, refuse
from deployments.preflight_findings import Finding
from deployments.snapshot import Snapshot
from tests.deployments.preflight_faults import (
    V1,
    Change,
    Document,
    faults,
    judged,
    pool,
    used,
)
from tests.deployments.preflight_kit import SOUND, broken, place, sound, step, training


def test_a_sound_cluster_is_silent() -> None:
    findings = preflight(Snapshot.read(SOUND), [training(), step()], place())
    assert faults(findings) == []
    assert {f.what for f in findings} >= {"PyTorchJob", "rights", "place", "quota", "state claim", "grace", "MLflow"}
    refuse(findings)


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


def test_every_resource_that_is_too_much_is_a_row() -> None:
    asked = training(resources={"gpus": 99, "memory": "99Ti"})
    rows = faults(preflight(Snapshot.read(SOUND), [asked], place()))
    told = {(r.what, word) for r in rows for word in ("nvidia.com/gpu", "memory") if word in r.found}
    assert told >= {("resources", "nvidia.com/gpu"), ("resources", "memory"), ("quota", "nvidia.com/gpu")}, rows


def test_two_faults_are_two_rows() -> None:
    document = sound()
    document["apis"].pop(V1)
    document["clock_offset"] = 30.0
    assert [r.what for r in judged(document)] == ["clock", "PyTorchJob"]


def test_a_step_needs_no_operator() -> None:
    document = sound()
    document["apis"].pop(V1)
    assert faults(preflight(Snapshot.from_json(json.dumps(document)), [step()], place())) == []


def no_gpus(document: Document) -> None:
    """Nodes as they are, their GPUs gone, and nothing that makes others."""
    document["objects"]["nodepools"] = []
    for node in document["objects"]["nodes"]:
        node["status"]["allocatable"].pop("nvidia.com/gpu", None)


def with_mark(document: Document) -> None:
    document["objects"]["autoscalers"] = [{"metadata": {"name": "cluster-autoscaler-status"}}]


@pytest.mark.parametrize(
    ("change", "settings", "verdict", "found"),
    [
        (lambda d: None, {}, "FAIL", "no node has nvidia.com/gpu"),
        (lambda d: None, {"autoscaler": "yes"}, "WARN", "something adds nodes here"),
        (with_mark, {}, "WARN", "the cluster autoscaler may make one"),
        (with_mark, {"autoscaler": "no"}, "FAIL", "no node has nvidia.com/gpu"),
        (lambda d: d["unreadable"].update(autoscalers="forbidden"), {}, "WARN", "may not be read here"),
    ],
)
def test_what_may_add_nodes_makes_it_a_wait(change: Change, settings: Document, verdict: str, found: str) -> None:
    def both(document: Document) -> None:
        no_gpus(document)
        change(document)

    rows = faults(preflight(broken(both), [training()], place(**settings)))
    assert {(r.what, r.verdict) for r in rows} == {("resources", verdict)}, rows
    assert all(found in r.found for r in rows), rows


def test_node_pools_that_may_not_be_read_refuse_nothing() -> None:
    def both(document: Document) -> None:
        no_gpus(document)
        document["unreadable"]["nodepools"] = "forbidden"

    rows = faults(preflight(broken(both), [training()], place()))
    assert {r.verdict for r in rows} == {"WARN"} and {r.what for r in rows} == {"resources", "what can be seen"}


def test_without_a_place_on_spot_it_waits_for_the_other_capacity() -> None:
    def no_spot(document: Document) -> None:
        document["objects"]["nodepools"] = []
        for node in document["objects"]["nodes"]:
            if node["metadata"]["labels"].get("karpenter.sh/capacity-type") == "spot":
                node["metadata"]["labels"]["karpenter.sh/capacity-type"] = "on-demand"

    assert {r.verdict for r in faults(preflight(broken(no_spot), [training(replicas=1)], place()))} == {"FAIL"}
    rows = faults(preflight(broken(no_spot), [training(replicas=1, start_seconds=900.0)], place()))
    assert [r.verdict for r in rows] == ["WARN"] and "the other capacity" in rows[0].found


def test_where_there_is_no_namespace_what_is_in_it_is_not_missed_too() -> None:
    def gone(document: Document) -> None:
        for plural in ("namespaces", "persistentvolumeclaims", "serviceaccounts", "resourcequotas", "limitranges"):
            document["objects"][plural] = []

    assert [r.what for r in faults(preflight(broken(gone), [training(), step()], place()))] == ["namespace"]


def test_mlflow_elsewhere_is_looked_at_there_or_said_to_be_unseen() -> None:
    url = {"MLFLOW_TRACKING_URI": "http://mlflow.reprise-services:5000"}

    def seen(**changes: Any) -> list[Finding]:
        return faults(preflight(broken(lambda d: d.update(probes={}, **changes)), [step()], place(env=url)))

    assert [(r.what, r.verdict) for r in seen()] == [("MLflow", "WARN")]
    rows = seen(services_of=["reprise", "reprise-services"])
    assert [(r.what, r.verdict) for r in rows] == [("MLflow", "FAIL")]
    assert "there is no Service mlflow in namespace reprise-services" in rows[0].found
