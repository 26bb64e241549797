"""Fixtures of the cluster tests: the API of KUBECONFIG, a namespace of one's own, a Runner on it.

Their imports are inside, because every other test passes here too. Helpers are in cluster_kit.py.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from deployments.cluster import Cluster
    from deployments.cluster_place import ClusterPlace
    from deployments.kube_api import KubeApi
    from tests.preflight_cluster_kit import Nodes


@pytest.fixture(scope="module")
def api() -> Iterator[KubeApi]:
    """The Kubernetes API of KUBECONFIG."""
    from deployments.kube_connect import connect

    if not os.environ.get("KUBECONFIG"):
        pytest.skip("no KUBECONFIG: this needs a Kubernetes API")
    connection = connect()
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def place(api: KubeApi, request: pytest.FixtureRequest) -> Iterator[ClusterPlace]:
    """A namespace of the test module's own, with its account and its ReadWriteMany claim."""
    from deployments.cluster_place import ClusterPlace
    from tests.cluster_kit import cluster_images, make_namespace

    module = Path(str(request.path)).stem.removeprefix("test_").replace("_", "-")
    name = f"reprise-{module}-{os.getpid()}"
    make_namespace(api, name)
    yield ClusterPlace(namespace=name, images=cluster_images(), node_loss_seconds=5)
    api.delete(f"/api/v1/namespaces/{name}")


@pytest.fixture
def strict_place(api: KubeApi) -> Iterator[ClusterPlace]:
    """A namespace that enforces `restricted`, for the preflight."""
    from tests.preflight_cluster_kit import make_strict_place

    with make_strict_place(api) as made:
        yield made


@pytest.fixture
def nodes(api: KubeApi) -> Iterator[Nodes]:
    """Nodes that are only told, for the preflight."""
    from tests.preflight_cluster_kit import Nodes

    with Nodes(api) as made:
        yield made


@pytest.fixture
def cluster(api: KubeApi, place: ClusterPlace) -> Iterator[Cluster]:
    """A Runner there; on the rig it sees the state volume too."""
    from deployments.cluster import Cluster
    from tests.cluster_kit import is_rig, rig_state

    state = rig_state() / "pvc" / f"{place.namespace}-reprise" if is_rig() else None
    if state is not None:
        until = time.monotonic() + 20
        while not state.is_dir() and time.monotonic() < until:
            time.sleep(0.2)
        os.chown(state, -1, place.user)  # what fsGroup does to the volume of a flow's pod
        state.chmod(0o2775)
    running = Cluster(place, api=api, state=state, start_patience=8.0)
    yield running
    running.close()


@pytest.fixture
def shared(cluster: Cluster) -> Iterator[Path]:
    """The state volume under one path here and in the pods."""
    from tests.cluster_kit import needs_rig

    needs_rig()
    assert cluster.state is not None
    path = Path(f"/{cluster.settings.namespace}")  # not below /tmp, which is a volume of its own in the pods
    path.mkdir()
    subprocess.run(["mount", "--bind", str(cluster.state), str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)
    path.rmdir()
