"""What the tests of registration share: a finished training, and the versions that MLflow has of it."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.mlflow_server import connect
from tasks.model_folder import sha256
from tasks.register_model import RegisterRequest

LINEAGE = {
    "git_sha": "c" * 40,
    "data_digest": "d" * 32 + ".dir",
    "run": "retrain-1",
    "key.pull_data": "1" * 40,
    "key.train_model": "2" * 40,
    "attempts": "3",
    "interruptions": "2",
}

_counter = iter(range(1, 1000))


def training(tmp_path: Path, uri: str, **change: Any) -> RegisterRequest:
    """A finished training on disk and in MLflow, under a model name of its own."""
    number = next(_counter)
    folder = tmp_path / f"training-{number}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(number.to_bytes(4, "little") * 1000)
    (folder / "digits.py").write_text("def build_model(params): ...\n")
    (folder / "classes.txt").write_text("zero\none\n")
    rows = [
        {
            "name": f"{i}.png",
            "body_b64": base64.b64encode(bytes([i] * 8)).decode(),
            "label": i,
            "answer": {"label": i, "scores": [0.25, 0.75]},
        }
        for i in range(5)
    ]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    client = connect(uri)
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    run = client.create_run(experiment.experiment_id)
    request = RegisterRequest(
        key=f"{number:040x}",
        pipeline=f"digits-{number}",
        tracking_uri=uri,
        run_id=run.info.run_id,
        experiment="digits",
        weights=str(folder / "model.safetensors"),
        weights_sha256=sha256(folder / "model.safetensors"),
        module=str(folder / "digits.py"),
        files=[str(folder / "classes.txt")],
        params={"learning_rate": 0.01, "width": 64},
        metrics={"accuracy": 0.97, "loss": 0.1},
        heldout=str(folder / "heldout.jsonl"),
        heldout_digest="d1",
        gate={"metric": "accuracy", "minimum": 0.95},
        lineage=LINEAGE,
        lock_folder=str(tmp_path / "store"),
    )
    return replace(request, **change)


def versions(request: RegisterRequest) -> list[Any]:
    return list(connect(request.tracking_uri).search_model_versions(f"name = '{request.pipeline}'"))
