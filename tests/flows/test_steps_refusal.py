"""A training that a cluster could never place, as Prefect shows it: `pytest -m e2e tests/flows/test_steps_refusal.py`.

A real Prefect server, the real step with the real Runner, and a scripted API whose nodes have no GPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deployments.cluster import Cluster
from deployments.cluster_place import ClusterPlace
from deployments.errors import PreflightError
from deployments.kube_connect import connect
from deployments.workload import Resources
from flows.run import Run
from tasks.capacity import CapacityPolicy
from tasks.records import Store
from tasks.train_model import TrainRequest
from tests.deployments.kube_fake import KubeFake
from tests.deployments.kube_store import NODES
from training.spec import TrainSpec

pytestmark = [
    pytest.mark.e2e,
    # Prefect's own client leaves a socket to its temporary server open.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
KEY = "0123456789abcdef"
REASON, FIX = "no node has nvidia.com/gpu, nor any other device", "install the NVIDIA device plugin"


@pytest.fixture(scope="module")
def prefect() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with KubeFake() as kube:
        labels = {"karpenter.sh/capacity-type": "spot"}
        room = {"allocatable": {"cpu": "8", "memory": "32Gi", "pods": "20"}}
        kube.put(NODES, {"metadata": {"name": "n1", "labels": labels}, "spec": {}, "status": room})
        images = {"step": "reprise-step", "train": "reprise-train"}
        (tmp_path / "state").mkdir()
        api = connect(kubeconfig=kube.kubeconfig(tmp_path), patience=6.0)
        made = Cluster(ClusterPlace(namespace="ns", images=images), api=api, state=tmp_path / "state")
        yield made
        made.close()
        api.close()
        assert kube.count("POST", "") == 0  # nothing was made


def a_run(cluster: Cluster, folder: Path) -> Run:
    step = SimpleNamespace(key=KEY, inputs={}, reused=False, reason="", record=None)
    document: dict[str, Any] = {"run": "digits-1", "steps": [{"name": "train_model", "status": "pending"}]}
    return Run(
        id="digits-1",
        plan=cast("Any", SimpleNamespace(steps={"train_model": step})),
        store=Store(root=str(folder / "store")),
        runner=cluster,
        urls={},
        document=document,
    )


def request(folder: Path) -> TrainRequest:
    spec = TrainSpec(
        key=KEY,
        pipeline="digits",
        module="digits.py",
        data=str(folder),
        checkpoints=str(folder / "checkpoints"),
        output=str(folder / "output"),
        progress=str(folder / "progress.jsonl"),
    )
    capacity = CapacityPolicy(spot=True, fallback=True, start_seconds=900.0)
    return TrainRequest(spec=spec, experiment="digits", capacity=capacity, resources=Resources(gpus=1))


def test_the_task_run_in_prefect_says_why_and_what_mends_it(prefect: None, cluster: Cluster, tmp_path: Path) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    from flows.steps import run_step
    from tasks.train_model import train_model

    run = a_run(cluster, tmp_path)

    @flow(name="refused", flow_run_name="refused-1", persist_result=False)
    async def refused() -> None:
        await run_step(run, train_model, request(tmp_path))

    async def seen() -> tuple[PreflightError, Any, list[Any]]:
        with pytest.raises(PreflightError) as error:
            await refused()
        async with get_client() as client:
            named = FlowRunFilter(name=FlowRunFilterName(any_=["refused-1"]))
            flow_run = (await client.read_flow_runs(flow_run_filter=named))[0]
            return error.value, flow_run, await client.read_task_runs(flow_run_filter=named)

    error, flow_run, task_runs = asyncio.run(seen())
    assert error.exit_code == 3
    assert REASON in str(error) and FIX in str(error)
    assert flow_run.state.name == "Failed"
    assert REASON in flow_run.state.message and FIX in flow_run.state.message
    (task_run,) = task_runs
    assert (task_run.name, task_run.state.name, task_run.run_count) == ("train_model", "Failed", 1)  # not tried again
    assert REASON in task_run.state.message and FIX in task_run.state.message
    row = run.step_row("train_model")
    assert row["status"] == "failed" and REASON in row["message"]
    assert run.store.attempts(KEY) == [] and run.document["attempts"] == []  # it was no attempt
