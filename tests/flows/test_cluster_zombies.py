"""The watch over a cluster's flows: who is left to a Job, who is resumed, and looks that fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.kube_api import KubeApi
from deployments.kube_connect import connect
from flows.cluster_zombies import FLOW_RUN, job_goes_on, watch
from tasks.records import Store
from tests.deployments.kube_fake import KubeFake
from tests.deployments.kube_store import JOBS
from tests.flows.test_zombies import Remembering, document, flow_run, prefect

__all__ = ["prefect"]
ENDED = {"conditions": [{"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}]}


@pytest.fixture
def kube() -> Iterator[KubeFake]:
    with KubeFake() as fake:
        yield fake


@pytest.fixture
def api(kube: KubeFake, tmp_path: Path) -> Iterator[KubeApi]:
    connection = connect(kubeconfig=kube.kubeconfig(tmp_path), patience=0.5)
    yield connection
    connection.close()


def job(kube: KubeFake, name: str, flow: str, *, status: dict[str, Any] | None = None, **meta: str) -> None:
    kube.put(JOBS, {"metadata": {"name": name, "labels": {FLOW_RUN: flow}, **meta}, "status": status or {"active": 1}})


def test_a_job_that_has_not_ended_goes_on(kube: KubeFake, api: KubeApi) -> None:
    assert not job_goes_on(api, "ns", "f1")
    job(kube, "a", "f1", status=ENDED)
    job(kube, "other", "f2")
    assert not job_goes_on(api, "ns", "f1")
    job(kube, "b", "f1")
    assert job_goes_on(api, "ns", "f1")
    job(kube, "b", "f1", deletionTimestamp="2026-01-01T00:00:00Z")
    assert not job_goes_on(api, "ns", "f1"), "it starts no pod any more"
    job(kube, "c", "f1", status={"ready": 0})
    assert job_goes_on(api, "ns", "f1"), "between two pods"


def looks(count: int) -> Callable[[float], bool]:
    left = iter([False] * count)
    return lambda seconds: next(left, True)


def looked(tmp_path: Path, prefect: Remembering, api: KubeApi, count: int = 1) -> list[str]:
    said: list[str] = []
    store = Store(root=str(tmp_path))
    watch(prefect, store, api, pool="reprise", namespace="ns", stopped=looks(count), tell=said.append)
    return said


def test_only_a_flow_whose_job_is_gone_is_resumed_and_once(
    tmp_path: Path, prefect: Remembering, kube: KubeFake, api: KubeApi
) -> None:
    store = Store(root=str(tmp_path))
    for name in ("f1", "f2"):
        document(store, f"digits-{name[1]}", name)
        flow_run(name)
    job(kube, "flow-2", "f2")
    assert looked(tmp_path, prefect, api, 3)[0] == "f1: its process died; resumed"
    assert {move[0] for move in Remembering.moves} == {"f1"}
    assert [move[1] for move in Remembering.moves].count("AwaitingRetry") == 1
    kube.change(JOBS, "flow-2", **ENDED)
    assert "f2: its process died; resumed" in looked(tmp_path, prefect, api)


def test_one_that_never_began_is_known_by_its_pool(tmp_path: Path, prefect: Remembering, api: KubeApi) -> None:
    for pool in ("reprise", "another"):
        flow_run(pool, state="CRASHED")
        Remembering.found[-1]["work_pool_name"] = pool
    assert looked(tmp_path, prefect, api) == ["reprise: its process died; resumed"]


def test_a_cluster_that_cannot_be_asked_is_told_once_and_nothing_is_done(
    tmp_path: Path, prefect: Remembering, kube: KubeFake, api: KubeApi
) -> None:
    document(Store(root=str(tmp_path)), "digits-1", "f1")
    flow_run("f1")
    kube.faults.append(("GET", JOBS, lambda: (403, {"kind": "Status", "message": "no", "reason": "Forbidden"}, {})))
    (said,) = looked(tmp_path, prefect, api, 2)
    assert said.startswith("looking for dead flows: ") and Remembering.moves == []
    kube.faults.clear()
    assert looked(tmp_path, prefect, api) == ["f1: its process died; resumed"]


def test_of_two_watches_one_looks(tmp_path: Path, prefect: Remembering, api: KubeApi) -> None:
    document(Store(root=str(tmp_path)), "digits-1", "f1")
    flow_run("f1")
    with Store(root=str(tmp_path)).lock("zombies"):
        (said,) = looked(tmp_path, prefect, api, 2)
    assert "lock 'zombies' is held" in said and Remembering.moves == []


def test_as_a_program_it_says_what_it_needs() -> None:
    done = subprocess.run([sys.executable, "-m", "flows.cluster_zombies"], capture_output=True, text=True)
    assert done.returncode == 2 and "--store, --prefect" in done.stderr
