"""cluster.toml: the shipped one, what manifests get of it, and what is refused in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deployments.cluster_place import ClusterPlace
from deployments.errors import ConfigError
from deployments.workload import Resources
from flows.cluster_settings import ClusterResourceSettings, load_cluster
from tasks.capacity import CapacityPolicy

LEAST = '[place]\nkind = "cluster"\n[images]\nstep = "r/step:1"\ntrain = "r/train:1"\n'


def test_the_shipped_cluster_says_the_defaults(tmp_path: Path) -> None:
    shipped = load_cluster("cluster", tmp_path)
    own = tmp_path / "cluster.toml"
    own.write_text(LEAST)
    least = load_cluster("cluster", tmp_path)
    assert (least.file, least.kind) == (own, "cluster")
    same = {"file", "text", "images", "resources"}
    assert shipped.model_dump(exclude=same) == least.model_dump(exclude=same)
    assert shipped.resources.train_model.gpus == 1
    assert shipped.resources.serve == least.resources.serve


def test_defaults_are_those_of_the_manifests(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text(LEAST)
    images = {"flow": "", "step": "r/step:1", "train": "r/train:1", "serve": ""}
    place = load_cluster("cluster", tmp_path).cluster_place()
    assert place == ClusterPlace(images=images, env={"MLFLOW_TRACKING_URI": "http://mlflow.reprise-services:5000"})


def test_every_key_reaches_the_place(tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    file.write_text(
        '[place]\nkind = "cluster"\nnamespace = "ml"\npriority_class = "low"\nqueue = "q"\nservice_account = "sa"\n'
        'keep_finished = "1h"\ncontext = "prod"\n[state]\nclaim = "vol"\nmount = "/vol/"\n'
        '[images]\nstep = "s"\ntrain = "t"\nserve = "v"\npull_secrets = ["registry"]\npull_policy = "Always"\n'
        '[services]\nmlflow = "https://mlflow.example/"\n[environment]\nsecrets = ["s3"]\n'
        'values = { AWS_REGION = "x" }\n'
        '[nodes]\nspot = { a = "b" }\non_demand = {}\ngpu = { gpu = "h100" }\ngpu_taint = "gpu"\n'
        'nccl_interface = "eth0"\n'
        'lost_after = "2m"\ntolerations = [{ key = "team", operator = "Equal", value = "ml" }]\n'
        '[resources.train_model]\ncpus = 2\ngpus = 1\ngpu_resource = "nvidia.com/mig-1g.10gb"\nshm = "1Gi"\n'
    )
    settings = load_cluster(file, tmp_path)
    place = settings.cluster_place()
    assert (place.namespace, place.priority_class, place.queue, place.service_account) == ("ml", "low", "q", "sa")
    assert (place.state_claim, place.state_mount, place.ttl_seconds, place.node_loss_seconds) == (
        "vol",
        "/vol",
        3600,
        120,
    )
    assert (place.image("serve"), place.image_pull_secrets, place.image_pull_policy) == ("v", ("registry",), "Always")
    assert place.env == {"MLFLOW_TRACKING_URI": "https://mlflow.example", "AWS_REGION": "x"}
    assert (place.spot_selector, place.on_demand_selector, place.gpu_selector) == ({"a": "b"}, {}, {"gpu": "h100"})
    assert (place.gpu_taint, place.nccl_interface, place.env_secrets) == ("gpu", "eth0", ("s3",))
    assert place.tolerations == ({"key": "team", "operator": "Equal", "value": "ml"},)
    assert settings.resources.by_step()["train_model"] == Resources(
        cpus=2, memory="1Gi", gpus=1, gpu_resource="nvidia.com/mig-1g.10gb", shm="1Gi"
    )


def test_there_are_resources_for_all_that_is_created() -> None:
    from flows.preflight import STEPS

    assert {*STEPS, "train_model", "deploy_model", "serve"} == set(ClusterResourceSettings.model_fields)


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ('[spot]\ngrace = "2m"', r'cluster.toml:7: \[spot\] grace = "2m": expected at least 1s and less than 120s'),
        ("[spot]\ngrase = 3", r'\[spot\] grase = 3: unknown key; did you mean "grace"\?'),
        ('[state]\nmount = "state"', r'\[state\] mount = "state": expected an absolute folder'),
        ('[state]\nmount = "/tmp"', r"expected an absolute folder of its own"),
        ('[services]\nmlflow = "mlflow:5000"', r'mlflow = "mlflow:5000": expected a URL that pods reach'),
        ('[nodes]\ntolerations = [{ key = "karpenter.sh/disrupted" }]', r"killed without a notice"),
        ('[nodes]\ntolerations = [{ operator = "Exists" }]', r"key\[0\]: expected this key"),
        ('[nodes]\ntolerations = [{ key = "a", efect = "NoExecute" }]', r'efect\[0\] .*did you mean "effect"\?'),
        ('[nodes]\ntolerations = { key = "a" }', r"expected a list"),
        ("[nodes]\nspot = { a = 1 }", r"\[nodes.spot\] a = 1: expected text in quotes"),
        ('[resources.train_model]\ngpus = "1"', r'gpus = "1": expected a whole number'),
        ("[resources.deploy]\ncpus = 1", r"\[resources\] deploy: unknown key"),
        ("[ports]\nmlflow = 5000", r"\[ports\]: unknown section"),
        ("[serving]\nreplicas = 0", r"replicas = 0: expected a number of at least 1"),
        ('[environment]\nvalues = { DB_PASSWORD = "hunter2hunter2" }', r"DB_PASSWORD = \"\*\*\*\": expected no secret"),
    ],
)
def test_mistake(tmp_path: Path, added: str, expected: str) -> None:
    (tmp_path / "cluster.toml").write_text(f"{LEAST}{added}\n")
    with pytest.raises(ConfigError) as caught:
        load_cluster("cluster", tmp_path)
    assert re.search(expected, str(caught.value)), str(caught.value)


def test_all_mistakes_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text('[place]\nkind = "cluster"\nnamespace = "A"\n[images]\nstep = "s"\n')
    with pytest.raises(ConfigError) as caught:
        load_cluster("cluster", tmp_path)
    first, second = str(caught.value).splitlines()
    assert '[place] namespace = "A": expected a namespace' in first
    assert "[images] train: expected this key" in second


def test_a_laptop_is_no_cluster(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'kind = "laptop": expected "cluster"'):
        load_cluster("laptop", tmp_path)
    (tmp_path / "cluster.toml").write_text('[place]\nkind = "cloud"\n')
    with pytest.raises(ConfigError, match=r'kind = "cloud": expected "laptop" or "cluster"'):
        load_cluster("cluster", tmp_path)


def test_the_policy_of_the_spot_market(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text(LEAST)
    assert load_cluster("cluster", tmp_path).spot.policy() == CapacityPolicy(
        spot=True, fallback=True, fallback_after=3, start_seconds=900.0, margin=1.5
    )
    told = '[spot]\ntrain = false\nfallback = false\nfallback_after = 0\nwait = "0s"\nmargin = 2.0\n'
    (tmp_path / "cluster.toml").write_text(f"{LEAST}{told}[resources.train_model]\nnodes = 4\n")
    other = load_cluster("cluster", tmp_path)
    assert other.spot.policy() == CapacityPolicy(
        spot=False, fallback=False, fallback_after=0, start_seconds=None, margin=2.0
    )
    assert other.resources.train_model.nodes == 4 and other.resources.by_step()["train_model"] == Resources()
    (tmp_path / "cluster.toml").write_text(f"{LEAST}[spot]\nmargin = 0.5\n[resources.pull_data]\nnodes = 2\n")
    with pytest.raises(ConfigError, match=r"(?s)margin.*nodes"):
        load_cluster("cluster", tmp_path)
