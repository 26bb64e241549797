"""Each alert fires when it should and stays silent when it should, by Prometheus' own test runner (promtool).

The cases are deployments/k8s/components/monitoring/rules.test.yaml, on series as DCGM, TorchServe and run_metrics give
them. Not covered: that Prometheus scrapes them (monitors.yaml; its relabelings are tried here on a DCGM sample).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

MONITORING = Path(__file__).resolve().parents[2] / "deployments" / "k8s" / "components" / "monitoring"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")


def groups() -> Any:
    """The groups of the PrometheusRule, as a rule file has them."""
    return yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]


def run_cases(folder: Path, rules: Any, cases: Any) -> subprocess.CompletedProcess[str]:
    """promtool test rules."""
    assert PROMTOOL
    (folder / "groups.yaml").write_text(yaml.safe_dump(rules))
    (folder / "cases.yaml").write_text(yaml.safe_dump(cases | {"rule_files": ["groups.yaml"]}))
    return subprocess.run([PROMTOOL, "test", "rules", "cases.yaml"], cwd=folder, capture_output=True, text=True)


@needs_promtool
def test_alerts_fire_and_stay_silent_as_meant(tmp_path: Path) -> None:
    cases = yaml.safe_load((MONITORING / "rules.test.yaml").read_text())
    done = run_cases(tmp_path, groups(), cases)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_cases_notice_a_rule_that_is_wrong(tmp_path: Path) -> None:
    rules, cases = groups(), yaml.safe_load((MONITORING / "rules.test.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if rule.get("alert") == "GPUUnderutilized":
                rule["for"] = "5m"
    done = run_cases(tmp_path, rules, cases)
    assert done.returncode != 0
    assert "GPUUnderutilized" in done.stdout + done.stderr


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    cases = yaml.safe_load((MONITORING / "rules.test.yaml").read_text())["tests"]
    fires: set[str] = set()
    silent: set[str] = set()
    for case in cases:
        for test in case.get("alert_rule_test", []):
            (fires if test["exp_alerts"] else silent).add(test["alertname"])
    alerts = {rule["alert"] for group in groups()["groups"] for rule in group["rules"] if "alert" in rule}
    assert fires == alerts
    # The others' silence is in the same case: exactly one alert of several series is expected.
    assert silent | {"GPUAllocatedIdle", "PredictionErrors", "QueueWaitLong"} == alerts


def test_alerts_about_trainings_name_the_run() -> None:
    for group in groups()["groups"]:
        for rule in group["rules"]:
            if rule.get("alert", "").startswith(("Training", "Checkpoint", "GPUUnder")):
                assert "$labels.run" in rule["annotations"]["summary"], rule["alert"]


def relabeled(labels: dict[str, str], steps: list[dict[str, Any]]) -> dict[str, str]:
    """What Prometheus makes of a sample's labels; the four actions that monitors.yaml uses."""
    found = dict(labels)
    for step in steps:
        pattern = re.compile(f"^(?:{step.get('regex', '(.*)')})$")
        replacement = re.sub(r"\$(\d)", r"\\\1", step.get("replacement", "$1"))
        if step["action"] == "labelmap":
            found |= {m.expand(replacement): v for k, v in found.items() if (m := pattern.match(k))}
        elif step["action"] == "labeldrop":
            found = {k: v for k, v in found.items() if not pattern.match(k)}
        elif step["action"] == "replace":
            if m := pattern.match(";".join(found.get(label, "") for label in step["sourceLabels"])):
                found[step["targetLabel"]] = m.expand(replacement)
        else:
            raise AssertionError(step)
    return found


def test_a_dcgm_sample_gets_the_labels_that_the_rules_ask_for() -> None:
    monitors = list(yaml.safe_load_all((MONITORING / "monitors.yaml").read_text()))
    (endpoint,) = monitors[0]["spec"]["endpoints"]
    assert endpoint["honorLabels"] is True, "else pod and namespace are the exporter's own"
    sample = {
        "gpu": "0",
        "Hostname": "spot-0",
        "namespace": "reprise",
        "pod": "train-5a7a2ed7e3f8-1-master-0",
        "container": "pytorch",
        "reprise_dev_key": "5a7a2ed7e3f8",
        "reprise_dev_pipeline": "digits",
        "reprise_dev_workload": "train-5a7a2ed7e3f8-1",
        "reprise_dev_step": "train_model",
        "app_kubernetes_io_component": "train",
    }
    wanted = {k: v for k, v in sample.items() if not k.startswith(("reprise_dev_", "app_kubernetes_io"))}
    wanted |= {"key": "5a7a2ed7e3f8", "pipeline": "digits", "step": "train_model", "component": "train"}
    wanted |= {"workload": "train-5a7a2ed7e3f8-1"}
    assert relabeled(sample, endpoint["metricRelabelings"]) == wanted
    alone = {"gpu": "1", "Hostname": "spot-0"}
    assert relabeled(alone, endpoint["metricRelabelings"]) == alone


def test_the_labels_are_let_through_by_the_exporter() -> None:
    values = yaml.safe_load((MONITORING.parent / "gpu-sharing" / "gpu-operator-values.yaml").read_text())
    allowed = [re.compile(pattern) for pattern in values["dcgmExporter"]["podLabelAllowlistRegex"]]
    for label in ("reprise.dev/key", "reprise.dev/pipeline", "reprise.dev/workload", "app.kubernetes.io/component"):
        assert any(pattern.match(label) for pattern in allowed), label
    assert not any(pattern.match("app.kubernetes.io/name") for pattern in allowed)
