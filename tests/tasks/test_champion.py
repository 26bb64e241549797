"""The alias as MLflow's API has it: against the stub, and the same against a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import ConfigError, GiveUp, TryAgain
from deployments.serving import call
from tasks.champion import Champion
from tests.tasks.serving_kit import registry, wait_for

PORT = 18180


@pytest.fixture(params=["stub", pytest.param("mlflow", marks=pytest.mark.e2e)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A server whose model `toy` has versions 1 and 2, and no alias."""
    if request.param == "stub":
        with registry() as stub:
            yield stub.uri
        return
    url = f"http://127.0.0.1:{PORT}"
    argv = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(PORT), "--workers", "1"]
    argv += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/m.db",
        "--artifacts-destination",
        str(tmp_path / "artifacts"),
    ]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(argv, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    try:
        wait_for(lambda: healthy(url), 90)
        api = f"{url}/api/2.0/mlflow"
        post(f"{api}/registered-models/create", b'{"name": "toy"}')
        run = post(f"{api}/runs/create", b'{"experiment_id": "0"}')["run"]["info"]
        for _ in range(2):
            version = {"name": "toy", "source": run["artifact_uri"] + "/model", "run_id": run["run_id"]}
            post(f"{api}/model-versions/create", json.dumps(version).encode())
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def healthy(url: str) -> bool:
    try:
        return call("GET", f"{url}/health", None).status == 200
    except TryAgain:
        return False


def post(url: str, body: bytes) -> dict[str, Any]:
    answer = call("POST", url, body, content_type="application/json")
    assert answer.status == 200, answer.body
    return answer.document()


@pytest.mark.timeout(180)
def test_the_alias_is_read_moved_and_taken_away(uri: str) -> None:
    champion = Champion(tracking_uri=uri, model="toy")
    assert champion.read() is None
    for version in ("1", "2", "2"):
        champion.move(version)
        assert champion.read() == version
    champion.move(None)
    champion.move(None)  # gone already
    assert champion.read() is None
    assert Champion(tracking_uri=uri, model="unknown").read() is None
    if str(PORT) in uri:  # the stub keeps no versions
        with pytest.raises(GiveUp, match="move to 99"):
            champion.move("99")


def test_failures_are_told_apart() -> None:
    with registry() as stub:
        stub.fail = 1
        with pytest.raises(TryAgain, match="move to 3 alias 'champion' of toy: 503: asked to fail"):
            Champion(tracking_uri=stub.uri, model="toy").move("3")
    with pytest.raises(TryAgain, match="refused"):
        Champion(tracking_uri="http://127.0.0.1:1", model="toy").read()
    with pytest.raises(ConfigError, match="expected the address of an MLflow server"):
        Champion(tracking_uri="sqlite:///m.db", model="toy")
