"""One version per training over a real `mlflow server`, whatever is killed, raced or lost on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import TryAgain
from tasks.mlflow_server import connect
from tasks.model_folder import sha256
from tasks.register_model import RegisterRequest, register_model
from tests.tasks.register_kit import training, versions

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope="module")
def server(mlflow_server: str) -> str:
    """With the experiment of the trainings."""
    connect(mlflow_server).create_experiment("digits")
    return mlflow_server


def in_process(request: RegisterRequest, tmp_path: Path, where: str = "never") -> subprocess.CompletedProcess[str]:
    path = tmp_path / f"{request.key}.json"
    path.write_text(json.dumps(asdict(request)))
    command = [sys.executable, "-c", KILLED, str(path), where]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


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


def test_eight_at_once_are_one_version(tmp_path: Path, server: str) -> None:
    request = training(tmp_path, server)
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: in_process(request, tmp_path), range(8)))
    assert [d.returncode for d in done] == [0] * 8, done[0].stderr
    assert {d.stdout.strip() for d in done} == {"1"}
    assert len(versions(request)) == 1


def test_different_trainings_at_once_are_a_version_each(tmp_path: Path, server: str) -> None:
    requests = [replace(training(tmp_path, server), pipeline="shared") for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda r: in_process(r, tmp_path), requests * 2))
    assert [d.returncode for d in done] == [0] * 8, done[0].stderr
    assert sorted(int(v.version) for v in versions(requests[0])) == [1, 2, 3, 4]
    assert connect(server).get_registered_model("shared").aliases == {"candidate": "4"}


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
