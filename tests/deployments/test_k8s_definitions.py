"""Objects of Karpenter, KEDA, Prometheus and NVIDIA against schemas written from their documentation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from deployments.cluster_place import ClusterPlace
from tests.deployments.k8s_kit import (
    K8S,
    OVERLAYS,
    SCHEMAS,
    Json,
    of_kind,
    raw,
)
from tests.deployments.kustomize_tree import (
    steps,
)


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
