"""NetworkPolicies and quotas: each namespace denies first, policies select pods that exist, GPUs are bounded."""

from __future__ import annotations

import pytest
import yaml

from deployments.cluster_place import ClusterPlace
from deployments.labels import ACCOUNT_LABEL
from deployments.serving_manifests import INFERENCE, METRICS, Serving, serving_deployment
from tests.deployments.k8s_kit import (
    K8S,
    NAMESPACES,
    OVERLAYS,
    WORKLOADS,
    against_restricted,
    of_kind,
    raw,
)


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
