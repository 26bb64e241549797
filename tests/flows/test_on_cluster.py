"""The cluster as a flow's pod sees it: which place is opened where, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.cluster import Cluster
from deployments.errors import ConfigError, PreflightError
from deployments.workload import Resources
from flows.cluster_settings import parse_cluster
from flows.on_cluster import OnCluster
from flows.on_laptop import OnLaptop
from flows.place import CLUSTER_VARIABLE, open_place
from tests.flows.test_cluster_settings import LEAST


def on_cluster(more: str = "") -> OnCluster:
    return OnCluster(settings=parse_cluster(LEAST + more, "cluster.toml"))


def test_in_a_pod_the_place_is_what_the_deployment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CLUSTER_VARIABLE, raising=False)
    assert isinstance(open_place("laptop", tmp_path), OnLaptop)
    assert open_place("cluster", tmp_path).kind == "cluster", "the shipped one"
    monkeypatch.setenv(CLUSTER_VARIABLE, LEAST + '[state]\nmount = "/vol"\n')
    place = open_place("cluster", tmp_path / "nowhere")
    assert (place.kind, place.state, place.outlives_flow) == ("cluster", Path("/vol"), True)
    monkeypatch.setenv(CLUSTER_VARIABLE, "[place]\nkind = 3\n")
    with pytest.raises(ConfigError, match=r"REPRISE_CLUSTER:2: \[place\] kind = 3"):
        open_place("cluster", tmp_path)


def test_services_for_pods_and_for_people() -> None:
    place = on_cluster('[services]\nprefect_outside = "https://prefect.example"\n')
    assert place.urls["prefect"] == "http://prefect.reprise-services:4200"
    assert place.pages == {"prefect": "https://prefect.example", "mlflow": "http://mlflow.reprise-services:5000"}


def test_each_step_gets_what_it_asks_for() -> None:
    place = on_cluster('[resources.deploy_model]\ncpus = 0.5\nmemory = "2Gi"\n[serving]\nreplicas = 3\n')
    assert place.wanted("deploy_model") == Resources(cpus=0.5, memory="2Gi")
    assert place.target is not None and place.target.replicas == 3 and place.target.kubeconfig == ""


def test_the_volume_has_to_be_there_and_writable(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"no folder that this process may write to; .* claim reprise"):
        on_cluster(f'[state]\nmount = "{tmp_path}/none"\n').ensure()
    on_cluster(f'[state]\nmount = "{tmp_path}"\n').ensure()


def test_its_runner_makes_objects_and_plays_no_market() -> None:
    assert isinstance(on_cluster().runner(), Cluster)
    with pytest.raises(ConfigError, match="only a laptop plays the spot market"):
        on_cluster().runner(["kill@20%"])
