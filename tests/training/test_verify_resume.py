"""The proof itself: equal after kills of every kind, and not equal when something is left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training.kills import plan_kills
from training.spec import CheckpointPolicy
from training.verify_resume import main

MakeSpec = Callable[..., Path]


def test_a_plan_has_every_kind_and_is_a_function_of_the_seed() -> None:
    plan = plan_kills(7, 12, seconds=10.0, processes=2, elastic=False)
    assert len({(kill.target, kill.signal) for kill in plan}) == 6
    assert {kill.moment for kill in plan} == {"step", "save"}
    assert plan == plan_kills(7, 12, seconds=10.0, processes=2, elastic=False)
    assert plan != plan_kills(8, 12, seconds=10.0, processes=2, elastic=False)
    assert len({kill.processes for kill in plan_kills(7, 12, seconds=10.0, processes=3, elastic=True)}) > 1


def test_ten_kills_of_every_kind_leave_every_hash_equal(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(epochs=5, params={"norm": True}, checkpoint=CheckpointPolicy(every_steps=4))
    output = tmp_path / "certificate.json"
    assert main(["--spec", str(spec), "--kills", "10", "--seed", "1", "--output", str(output)]) == 0
    certificate = json.loads(output.read_text())
    assert certificate["equal"] and certificate["kills"] == 10
    assert len({(kill["target"], kill["signal"]) for done in certificate["interrupted"] for kill in done["kills"]}) == 6


def test_a_model_that_remembers_outside_its_state_is_found_out(make_spec: MakeSpec, tmp_path: Path) -> None:
    module = tmp_path / "leaky.py"
    tiny = Path(__file__).parent / "modules" / "tiny.py"
    module.write_text(
        tiny.read_text()
        + """
_seen = [0]
def loss(output, target):
    _seen[0] += 1
    return torch.nn.functional.cross_entropy(output, target) * (1 + 0.01 * _seen[0])
"""
    )
    spec = make_spec(module=str(module), checkpoint=CheckpointPolicy(every_steps=4))
    output = tmp_path / "certificate.json"
    assert main(["--spec", str(spec), "--kills", "2", "--seed", "1", "--output", str(output)]) == 1
    assert json.loads(output.read_text())["equal"] is False


def test_a_training_that_cannot_run_has_no_certificate(
    make_spec: MakeSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(params={"fail_at": 3})
    assert main(["--spec", str(spec), "--kills", "1", "--output", str(tmp_path / "none.json")]) == 1
    assert "uninterrupted training exited 1" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("processes", "changes", "elastic"),
    [
        pytest.param(1, {}, False, id="1"),
        pytest.param(2, {}, False, id="2"),
        pytest.param(3, {}, False, id="3"),
        pytest.param(4, {}, False, id="4"),
        pytest.param(2, {"parallel": "fsdp"}, False, id="2-fsdp2"),
        pytest.param(3, {}, True, id="elastic"),
        pytest.param(2, {"accumulate": 2, "precision": "bfloat16"}, False, id="2-accumulate-bfloat16"),
    ],
)
def test_25_kills_of_every_kind(
    make_spec: MakeSpec, tmp_path: Path, processes: int, changes: dict[str, Any], elastic: bool
) -> None:
    spec = make_spec(epochs=10, params={"norm": True}, checkpoint=CheckpointPolicy(every_steps=4), **changes)
    output = tmp_path / "certificate.json"
    arguments = ["--kills", "25", "--seed", "1", "--processes", str(processes), *(["--elastic"] if elastic else [])]
    assert main(["--spec", str(spec), *arguments, "--output", str(output)]) == 0
    certificate = json.loads(output.read_text())
    assert certificate["equal"] and certificate["kills"] == 25


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler for the processor (g++)")
def test_a_compiled_training_resumes_to_the_bit(make_spec: MakeSpec, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"compile": True, "accumulate": 2, "precision": "bfloat16", "params": {"norm": True}}
    spec = make_spec(epochs=5, checkpoint=CheckpointPolicy(every_steps=4), **settings)
    output = tmp_path / "certificate.json"
    assert main(["--spec", str(spec), "--kills", "6", "--seed", "1", "--processes", "1", "--output", str(output)]) == 0
    certificate = json.loads(output.read_text())
    assert certificate["equal"] and certificate["kills"] == 6
