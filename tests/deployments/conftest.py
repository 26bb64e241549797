"""Fixtures of the tests on a scripted Kubernetes API: the API, and the Runner on it.

Not covered: the API of KUBECONFIG, for tests marked `cluster` (tests/conftest.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.cluster import Cluster
from deployments.kube_connect import connect
from deployments.workload import Runner
from tests.deployments.kube_fake import KubeFake
from tests.deployments.runner_kit import PLACE, three_nodes


@pytest.fixture
def kube() -> Iterator[KubeFake]:
    """An API server without nodes."""
    with KubeFake() as fake:
        yield fake


@pytest.fixture
def cluster(kube: KubeFake, tmp_path: Path) -> Iterator[Cluster]:
    """A Runner on three nodes, with little patience."""
    three_nodes(kube)
    (tmp_path / "state").mkdir()
    api = connect(kubeconfig=kube.kubeconfig(tmp_path), patience=6.0)
    place = Cluster(PLACE, api=api, state=tmp_path / "state", start_patience=0.3, lost_node_seconds=0.5)
    runner: Runner = place
    assert runner.place == "cluster"
    yield place
    place.close()
    api.close()
