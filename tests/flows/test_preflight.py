"""What the command shows of a preflight, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deployments.errors import ConfigError, PreflightError, Unreachable
from deployments.workload import Resources
from flows.preflight import dvc_probe, look, planned_workloads, show_preflight
from tests.deployments.preflight_kit import SOUND, named, place, sound

GPU = {"train_model": Resources(cpus=8, memory="32Gi", gpus=2, shm="8Gi")}


def workloads(nodes: int = 3) -> list:  # type: ignore[type-arg]
    return planned_workloads(pipeline="digits", workers=2, resources=GPU, nodes=nodes, grace_seconds=90.0)


def test_a_run_on_the_sound_cluster_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    findings = look(place(), workloads(), snapshot=SOUND)
    show_preflight(findings, as_json=False)
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["what", "", "found", "fix"]
    assert {row[1] for row in rows[1:]} == {"OK"}


def test_the_worst_comes_first_and_one_fail_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = sound()
    document["version"] = "v1.27.0"
    named(document, "nodes", "gpu-od-0")["spec"]["unschedulable"] = True
    file = tmp_path / "snapshot.json"
    file.write_text(json.dumps(document))
    findings = look(place(), workloads(), snapshot=file)
    with pytest.raises(PreflightError, match="cordoned nodes") as refused:
        show_preflight(findings, as_json=True)
    assert refused.value.exit_code == 3
    shown = json.loads(capsys.readouterr().out)
    assert [row["verdict"] for row in shown[:3]] == ["FAIL", "WARN", "OK"]
    assert set(shown[0]) == {"what", "verdict", "found", "fix"}


def test_a_warning_refuses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    images = {kind: f"registry.example/{kind}:v1" for kind in ("step", "train")}
    show_preflight(look(place(images=images), workloads(), snapshot=SOUND), as_json=False)
    assert "it would run; 2 things to know" in capsys.readouterr().out


def test_a_snapshot_is_saved_as_it_was_read(tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    first = look(place(), workloads(), snapshot=SOUND, save=copy)
    assert look(place(), workloads(), snapshot=copy) == first


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ('{"format": 9}', "format 9"), ("[]", "format 'list'"), ('{"format": 1, "x": 2}', "'x'")],
)
def test_a_file_that_is_no_snapshot_is_told(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "snapshot.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        look(place(), workloads(), snapshot=file)


def test_a_snapshot_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        look(place(), workloads(), snapshot=tmp_path / "none.json")


def test_the_dvc_probe_keeps_what_was_said() -> None:
    def fails() -> None:
        raise Unreachable("s3://bucket does not answer\nmore")

    assert dvc_probe(fails) == {"remote": "the data's remote", "error": "s3://bucket does not answer"}
    assert dvc_probe(lambda: None)["verify"] is True
