"""The dashboard loads, and it and the alerts ask for metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import yaml

from deployments.run_metrics import collect
from tests.deployments.k8s_kit import (
    K8S,
    SCHEMAS,
    Json,
)


def dashboard() -> Json:
    """The dashboard's JSON."""
    document = json.loads((K8S / "components" / "monitoring" / "dashboard.json").read_text())
    assert isinstance(document, dict)
    return document


def known_metrics() -> set[str]:
    """What is exported or recorded somewhere; DCGM's as in its default list, TorchServe's as measured."""
    rule_file = yaml.safe_load((K8S / "components" / "monitoring" / "rules.yaml").read_text())
    recorded = {r["record"] for g in rule_file["spec"]["groups"] for r in g["rules"] if "record" in r}
    ours = {metric.name for metric in collect(Path("/nonexistent"), {}, 0.0)}
    dcgm = {f"DCGM_FI_{n}" for n in ("DEV_GPU_UTIL", "DEV_FB_USED", "DEV_XID_ERRORS", "PROF_GR_ENGINE_ACTIVE")}
    torchserve = {"ts_inference_requests_total", "ts_inference_latency_microseconds", "ts_queue_latency_microseconds"}
    others = {"Requests2XX", "Requests5XX", "ALERTS", "up"}
    volumes = {"kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"}
    return recorded | ours | dcgm | torchserve | others | volumes


def metrics_in(expression: str) -> set[str]:
    """Names that look like metrics: followed by a selector, a range, or standing alone, and no function or label."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\b(by|on|group_left|without|ignoring)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    names = re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\w*\s*\()", bare)
    words = {"and", "or", "unless", "by", "on", "bool", "time", "vector"}
    return {n for n in names if n not in words and ("_" in n or ":" in n or n[0].isupper() or n == "up")}


def test_the_dashboard_loads_and_asks_for_metrics_that_exist() -> None:
    document = dashboard()
    jsonschema.validate(document, yaml.safe_load((SCHEMAS / "grafana.yaml").read_text()))
    panels = document["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert cell not in taken, f"{panel['title']} lies on {taken.get(cell)}"
            taken[cell] = panel["title"]
    expressions = [t["expr"] for p in panels for t in p.get("targets", [])]
    expressions += [a["expr"] for a in document["annotations"]["list"]]
    for expression in expressions:
        assert metrics_in(expression) <= known_metrics(), expression
    rows = [p["title"] for p in panels if p["type"] == "row"]
    assert rows == ["GPUs", "Trainings", "Served models"]


def test_the_alerts_ask_for_metrics_that_exist() -> None:
    rule_file = yaml.safe_load((K8S / "components" / "monitoring" / "rules.yaml").read_text())
    for group in rule_file["spec"]["groups"]:
        for rule in group["rules"]:
            assert metrics_in(str(rule["expr"])) <= known_metrics(), rule
    assert metrics_in('sum(rate(torchserve_queue_latency_seconds{a="b"}[5m]))') == {"torchserve_queue_latency_seconds"}
