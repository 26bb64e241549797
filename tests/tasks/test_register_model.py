"""Registration against MLflow's SQLite store: what a version carries, once, and which requests are refused.

Not covered: the gate (test_register_model_gate.py), kills and races over HTTP (test_register_model_kills.py).
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import ConfigError, GiveUp, TryAgain
from tasks.mlflow_server import connect
from tasks.model_folder import sha256
from tasks.register_model import register_model
from tests.tasks.mlflow_kit import free_port
from tests.tasks.register_kit import LINEAGE, training, versions


def test_everything_a_version_must_carry(tmp_path: Path, database: str) -> None:
    request = training(tmp_path, database)
    model = register_model(request)
    assert (model.version, model.accepted, model.created) == ("1", True, True)
    client = connect(database)
    version = client.get_model_version_by_alias(request.pipeline, "candidate")
    assert version.version == "1" or version.version == 1
    tags = version.tags
    assert tags["reprise.step_key"] == request.key and tags["reprise.gate"] == "accepted"
    assert {k.removeprefix("reprise."): v for k, v in tags.items() if k.removeprefix("reprise.") in LINEAGE} == LINEAGE
    assert tags["reprise.weights_sha256"] == request.weights_sha256
    assert json.loads(tags["reprise.decision"]) == model.decision
    assert "accuracy 0.97 >= 0.95" in version.description and LINEAGE["git_sha"] in version.description
    assert "champion" not in client.get_registered_model(request.pipeline).aliases, "only a deployment moves it"
    run = client.get_run(request.run_id)
    assert run.data.params == {"learning_rate": "0.01", "width": "64"}
    assert run.data.metrics == {"heldout_accuracy": 0.97, "heldout_loss": 0.1}
    assert run.data.tags["reprise.git_sha"] == LINEAGE["git_sha"]


def test_folder_has_no_pickle_and_a_batch_of_examples(tmp_path: Path, database: str) -> None:
    request = training(tmp_path, database)
    source = Path(register_model(request).source)
    assert {p.name for p in source.iterdir()} == {
        "MLmodel",
        "model.safetensors",
        "digits.py",
        "classes.txt",
        "params.json",
        "heldout.jsonl",
        "input_example.json",
        "serving_input_example.json",
    }
    from mlflow.models import Model

    model = Model.load(str(source))
    assert set(model.flavors) == {"reprise"}
    assert model.flavors["reprise"]["files"]["model.safetensors"] == request.weights_sha256
    assert [(c.name, str(c.type)) for c in model.signature.inputs] == [("body", "DataType.binary")]
    assert [(c.name, str(c.type)) for c in model.signature.outputs] == [
        ("label", "DataType.long"),
        ("scores", "Array(double)"),
    ]
    example = json.loads((source / "input_example.json").read_text())
    assert [base64.b64decode(row[0]) for row in example["data"]] == [
        bytes(8),
        bytes([1] * 8),
    ]
    assert sha256(source / "model.safetensors") == request.weights_sha256
    assert not list((tmp_path / "store" / "scratch").rglob("*.safetensors")), "nothing is left behind"


def test_again_is_the_same_version_and_uploads_nothing(tmp_path: Path, database: str) -> None:
    request = training(tmp_path, database)
    first = register_model(request)
    stamp = {p: p.stat().st_mtime_ns for p in Path(first.source).iterdir()}
    again = register_model(request)
    assert again == replace(first, created=False)
    assert len(versions(request)) == 1
    assert {p: p.stat().st_mtime_ns for p in Path(first.source).iterdir()} == stamp
    history = connect(database).get_metric_history(request.run_id, "heldout_accuracy")
    assert len(history) == 1


def test_as_a_step_program_a_refusal_ends_with_4(tmp_path: Path, database: str) -> None:
    from tasks.step import run_step

    request = training(tmp_path, database, metrics={"accuracy": float("inf")})
    (tmp_path / "request.json").write_text(json.dumps(asdict(request)))
    assert run_step("register_model", tmp_path / "request.json", tmp_path / "result.json") == 4
    error = json.loads((tmp_path / "result.json").read_text())["error"]
    assert error["type"] == "GateRefused" and "metric 'accuracy' is inf" in error["message"]
    good = replace(request, key="a" * 40, metrics={"accuracy": 1.0}, pipeline="other")
    (tmp_path / "request.json").write_text(json.dumps(asdict(good)))
    assert run_step("register_model", tmp_path / "request.json", tmp_path / "result.json") == 0
    assert json.loads((tmp_path / "result.json").read_text())["result"]["version"] == "1"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"pipeline": "Digits"}, ConfigError, "pipeline.name = 'Digits'"),
        ({"pipeline": "a/b"}, ConfigError, "pipeline.name"),
        ({"pipeline": "-x"}, ConfigError, "pipeline.name"),
        ({"pipeline": "x-"}, ConfigError, "pipeline.name"),
        ({"pipeline": "a" * 41}, ConfigError, "pipeline.name"),
        ({"pipeline": "x' or 'a' = 'a"}, ConfigError, "pipeline.name"),
        ({"key": "' or 1"}, GiveUp, "register_model.key"),
        ({"gate": {"minimum": float("nan")}}, ConfigError, "gate.minimum = nan"),
        (
            {"experiment": "other"},
            GiveUp,
            "is in experiment 'digits'; expected 'other'",
        ),
        ({"run_id": "0" * 32}, GiveUp, "not found"),
        ({"weights_sha256": "0" * 64}, GiveUp, "expected sha256 0000"),
        ({"weights": "/nowhere/model.safetensors"}, GiveUp, "there is no such file"),
        ({"tracking_uri": ""}, GiveUp, "tracking_uri is empty"),
    ],
)
def test_wrong_requests(
    tmp_path: Path,
    database: str,
    change: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    request = training(tmp_path, database)
    with pytest.raises(error, match=words):
        register_model(replace(request, **change))
    assert versions(request) == []


def test_two_files_of_one_name(tmp_path: Path, database: str) -> None:
    request = training(tmp_path, database)
    with pytest.raises(ConfigError, match=r"would both be 'digits\.py'"):
        register_model(replace(request, files=[request.module]))


def test_heldout_rows_that_cannot_be_used(tmp_path: Path, database: str) -> None:
    request = training(tmp_path, database)
    Path(request.heldout).write_text('{"name": "a", "body_b64": "!", "answer": {}}\n')
    with pytest.raises(GiveUp, match=r"heldout\.jsonl:1: not a held-out row"):
        register_model(request)
    Path(request.heldout).write_text("")
    with pytest.raises(GiveUp, match="no held-out answers"):
        register_model(request)


def test_server_away_is_try_again(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = free_port()
    request = replace(training(tmp_path, database), tracking_uri=f"http://127.0.0.1:{port}")
    with pytest.raises(
        TryAgain,
        match=f"MLflow at http://127.0.0.1:{port} did not answer while registering",
    ):
        register_model(request)
