"""The gate's verdict in the registry: refused, accepted, judged again by other rules, and the certificate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.errors import GateRefused, GiveUp
from tasks.mlflow_server import connect
from tasks.register_model import register_model
from tests.tasks.register_kit import LINEAGE, training, versions


def test_other_rules_judge_the_same_version_again(tmp_path: Path, database: str) -> None:
    strict = training(tmp_path, database, gate={"minimum": 0.99})
    with pytest.raises(GateRefused):
        register_model(strict)
    milder = replace(strict, key="f" * 40, gate={"minimum": 0.9})
    model = register_model(milder)
    assert (model.version, model.created, len(versions(strict))) == ("1", False, 1)
    (version,) = versions(strict)
    assert version.tags["reprise.gate"] == "accepted" and version.tags["reprise.step_key"] == "f" * 40
    with pytest.raises(GateRefused):
        register_model(replace(strict, key="e" * 40))
    assert "candidate" not in connect(database).get_registered_model(strict.pipeline).aliases


def test_refused_is_recorded_without_alias_and_stays_refused(tmp_path: Path, database: str) -> None:
    champion = {"version": "7", "metrics": {"accuracy": 0.99}, "heldout_digest": "d1"}
    request = training(tmp_path, database, champion=champion)
    told = []
    for _ in range(2):
        with pytest.raises(
            GateRefused,
            match=r"version 1 may not serve: accuracy 0\.97 against 0\.99 of champion",
        ) as no:
            register_model(request)
        told.append(str(no.value))
        assert no.value.exit_code == 4
    assert told[0] == told[1]
    (version,) = versions(request)
    assert version.tags["reprise.gate"] == "refused" and "**Refused**" in version.description
    assert json.loads(version.tags["reprise.decision"])["champion_value"] == 0.99
    assert connect(database).get_registered_model(request.pipeline).aliases == {}


def test_nan_is_refused_by_name(tmp_path: Path, database: str) -> None:
    request = training(tmp_path, database, metrics={"accuracy": 0.99, "loss": float("nan")})
    with pytest.raises(GateRefused, match="metric 'loss' is nan"):
        register_model(request)
    assert "heldout_loss" not in connect(database).get_run(request.run_id).data.metrics


def test_missing_metric_is_refused_with_those_there_are(tmp_path: Path, database: str) -> None:
    with pytest.raises(GateRefused, match="the metrics there are: accuracy, loss"):
        register_model(training(tmp_path, database, gate={"metric": "f1"}))


def test_certificate(tmp_path: Path, database: str) -> None:
    rules = {"minimum": 0.9, "require_resume_certificate": True}
    bare = training(tmp_path, database, gate=rules)
    with pytest.raises(GateRefused, match="there is no certificate"):
        register_model(bare)
    proof = tmp_path / "certificate.json"
    request = training(tmp_path, database, gate=rules, certificate=str(proof))
    good = {
        "key": LINEAGE["key.train_model"],
        "weights_sha256": request.weights_sha256,
        "identical": True,
    }
    proof.write_text(json.dumps(good | {"weights_sha256": "0" * 64}))
    with pytest.raises(GateRefused, match="for weights '0000"):
        register_model(request)
    request = training(tmp_path, database, gate=rules, certificate=str(proof))
    proof.write_text(json.dumps(good | {"weights_sha256": request.weights_sha256}))
    model = register_model(request)
    assert Path(model.source, "resume_certificate.json").read_bytes() == proof.read_bytes()
    proof.write_text("not json")
    with pytest.raises(GiveUp, match="cannot be read"):
        register_model(request)
