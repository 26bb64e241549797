"""Fixtures that several files of this folder share: MLflow without and with a server, the rolling update's bench.

Their imports are inside, because every other test passes here too. A file may have a `made` and `bench` of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.tasks.rolling_bench_kit import Bench


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow's own SQLite store, without a server; with an experiment."""
    from tasks.mlflow_server import connect

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    connect(uri).create_experiment("digits", artifact_location=str(folder / "artifacts"))
    return uri


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `mlflow server`."""
    from tests.tasks.mlflow_kit import mlflow_server

    with mlflow_server(tmp_path_factory.mktemp("server")) as uri:
        yield uri


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three packaged versions."""
    from tests.tasks.serving_kit import three_versions

    return three_versions(tmp_path_factory.mktemp("made"))


@pytest.fixture
def bench(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """The rolling update's."""
    from tests.tasks.rolling_bench_kit import make_bench

    monkeypatch.setattr("deployments.cluster_serving.POLL_SECONDS", 0.02)
    monkeypatch.setattr("tasks.rolling_update.POLL", 0.02)
    with make_bench(made, tmp_path) as bench:
        yield bench
