"""Registration against a real MLflow: one version per training whatever is killed or run twice, and the gate's exits.

The quick tests use MLflow's SQLite store in this process; those marked e2e use a real `mlflow server` over HTTP.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import ConfigError, GateRefused, GiveUp, TryAgain
from tasks.mlflow_server import connect
from tasks.model_folder import sha256
from tasks.register_model import RegisterRequest, register_model

ROOT = Path(__file__).parents[2]
PORTS = range(18200, 18250)
LINEAGE = {
    "git_sha": "c" * 40,
    "data_digest": "d" * 32 + ".dir",
    "run": "retrain-1",
    "key.pull_data": "1" * 40,
    "key.train_model": "2" * 40,
    "attempts": "3",
    "interruptions": "2",
}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow's own SQLite store, without a server."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    connect(uri).create_experiment("digits", artifact_location=str(folder / "artifacts"))
    return uri


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `mlflow server` on SQLite, which serves artifacts too."""
    folder = tmp_path_factory.mktemp("server")
    port = next(p for p in PORTS if _free(p))
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "a"),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)
    uri = f"http://127.0.0.1:{port}"
    try:
        give_up = time.monotonic() + 120
        while not _healthy(uri):
            assert process.poll() is None and time.monotonic() < give_up, (folder / "log").read_text()
            time.sleep(0.2)
        connect(uri).create_experiment("digits")
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _healthy(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


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
    port = next(p for p in PORTS if _free(p))
    request = replace(training(tmp_path, database), tracking_uri=f"http://127.0.0.1:{port}")
    with pytest.raises(
        TryAgain,
        match=f"MLflow at http://127.0.0.1:{port} did not answer while registering",
    ):
        register_model(request)


# What the step does, in a process of its own that kills itself where the test says.
KILLED = """
import json, os, signal, sys
from mlflow import MlflowClient
from tasks.register_model import RegisterRequest, register_model
where, real = sys.argv[2], MlflowClient.create_model_version
def create(self, *args, **kwargs):
    if where == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    version = real(self, *args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
sent = []
real_log = MlflowClient.log_artifact
def log_artifact(self, *args, **kwargs):
    if where == "upload" and len(sent) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    sent.append(args)
    return real_log(self, *args, **kwargs)
if where != "never":
    MlflowClient.create_model_version = create
    MlflowClient.log_artifact = log_artifact
print(register_model(RegisterRequest(**json.load(open(sys.argv[1])))).version)
"""


def in_process(request: RegisterRequest, tmp_path: Path, where: str = "never") -> subprocess.CompletedProcess[str]:
    path = tmp_path / f"{request.key}.json"
    path.write_text(json.dumps(asdict(request)))
    command = [sys.executable, "-c", KILLED, str(path), where]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


@pytest.mark.e2e
@pytest.mark.parametrize("where", ["upload", "before", "after"])
def test_kill_then_again_is_one_version(tmp_path: Path, server: str, where: str) -> None:
    request = training(tmp_path, server)
    killed = in_process(request, tmp_path, where)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(versions(request)) == (1 if where == "after" else 0)
    model = register_model(request)
    assert (model.version, model.created) == ("1", where != "after")
    assert len(versions(request)) == 1
    client = connect(server)
    assert client.get_registered_model(request.pipeline).aliases == {"candidate": "1"}
    got = Path(client.download_artifacts(request.run_id, "model", str(tmp_path)))
    assert sha256(got / "model.safetensors") == request.weights_sha256
    assert model.source.startswith("mlflow-artifacts:/")
    assert not list((tmp_path / "store" / "scratch").rglob("*.safetensors"))
    assert model.model_url == f"{server}/#/models/{request.pipeline}/versions/1"


def register_in_child(request: RegisterRequest, kill_at: int, when: str) -> int:
    """Register in a fork that kills itself before or after its n-th request to MLflow; returns the wait status."""
    child = os.fork()
    if child == 0:
        import requests

        sent = 0
        real = requests.Session.send

        def send(self: requests.Session, *args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            sent += 1
            if sent == kill_at and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            answer = real(self, *args, **kwargs)
            if sent == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        requests.Session.send = send  # type: ignore[method-assign]
        try:
            register_model(request)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.e2e
@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_at_every_request_to_mlflow_is_one_version(tmp_path: Path, server: str, when: str) -> None:
    """Killed at its first request, again at its second, and so on until it comes through: still one version, whole."""
    kills = 0
    for number in range(1, 200):
        request = training(tmp_path, server)
        status = register_in_child(request, number, when)
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
        assert len(versions(request)) <= 1
        register_model(request)
        assert len(versions(request)) == 1
        client = connect(server)
        assert client.get_registered_model(request.pipeline).aliases == {"candidate": "1"}
        assert {a.path for a in client.list_artifacts(request.run_id, "model")} >= {
            "model/MLmodel",
            "model/params.json",
        }
    assert kills > 12, "lookup, run, eight files, batches, model, version, alias"


@pytest.mark.e2e
def test_eight_at_once_are_one_version(tmp_path: Path, server: str) -> None:
    request = training(tmp_path, server)
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: in_process(request, tmp_path), range(8)))
    assert [d.returncode for d in done] == [0] * 8, done[0].stderr
    assert {d.stdout.strip() for d in done} == {"1"}
    assert len(versions(request)) == 1


@pytest.mark.e2e
def test_different_trainings_at_once_are_a_version_each(tmp_path: Path, server: str) -> None:
    requests = [replace(training(tmp_path, server), pipeline="shared") for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda r: in_process(r, tmp_path), requests * 2))
    assert [d.returncode for d in done] == [0] * 8, done[0].stderr
    assert sorted(int(v.version) for v in versions(requests[0])) == [1, 2, 3, 4]
    assert connect(server).get_registered_model("shared").aliases == {"candidate": "4"}


@pytest.mark.e2e
def test_server_killed_in_the_middle_is_try_again(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reply to the creation is lost: the step says try again, and the next try finds the version."""
    from mlflow import MlflowClient
    from requests.exceptions import ConnectionError as Lost

    request = training(tmp_path, server)
    real = MlflowClient.create_model_version

    def lose(self: MlflowClient, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        raise Lost("connection reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", lose)
        with pytest.raises(TryAgain, match="did not answer while registering"):
            register_model(request)
    assert register_model(request).created is False
    assert len(versions(request)) == 1
