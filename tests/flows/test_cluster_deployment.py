"""The deployment of a cluster's pool, as Prefect's models and our pool's template take it; the file for stock use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.actions import DeploymentCreate

from flows.cluster_deployment import cluster_deployment
from flows.cluster_settings import load_cluster, parse_cluster
from flows.settings import load_pipeline
from tests.flows.push_kit import git
from tests.flows.test_cluster_settings import LEAST
from tests.flows.test_settings import GOOD

ROOT = Path(__file__).resolve().parents[2]
MORE = """pull_secrets = ["registry"]
flow = "r/flow:1"
[environment]
secrets = ["git"]
values = { AWS_REGION = "x" }
[services]
mlflow = "http://m:5000"
"""


def made(folder: Path, more: str = "", pipeline: str = "") -> dict[str, Any]:
    git(folder, "init", "-q")
    (folder / "cluster.toml").write_text(LEAST + more)
    project = folder / "models" / "digits"
    project.mkdir(parents=True)
    settings = load_cluster(folder / "cluster.toml", folder)
    loaded = load_pipeline(GOOD + pipeline, file=project / "pipeline.toml")
    return cluster_deployment(loaded, settings, git="https://git.example/digits.git")


def test_prefect_reads_it(tmp_path: Path) -> None:
    body = made(tmp_path, pipeline='[schedule]\ncron = "0 3 * * *"\noverlap = "skip"\n')
    read = DeploymentCreate.model_validate({"flow_id": "00000000-0000-0000-0000-000000000000", **body})
    assert read.parameters == {"pipeline": "models/digits/pipeline.toml", "place": "cluster", "rev": "HEAD"}
    assert read.concurrency_limit == 1 and body["concurrency_options"] == {"collision_strategy": "CANCEL_NEW"}
    fields = body["parameter_openapi_schema"]["properties"]
    assert fields["pipeline"]["enum"] == ["models/digits/pipeline.toml"]
    assert [s["active"] for s in body["schedules"]] == [True]


def test_what_the_pod_is_told(tmp_path: Path) -> None:
    variables = made(tmp_path, MORE)["job_variables"]
    assert (variables["image"], variables["namespace"], variables["state_mount"]) == ("r/flow:1", "reprise", "/reprise")
    assert variables["image_pull_secrets"] == [{"name": "registry"}]
    assert variables["env_from"] == [{"secretRef": {"name": "git"}}]
    env = variables["env"]
    assert (env["AWS_REGION"], env["MLFLOW_TRACKING_URI"]) == ("x", "http://m:5000")
    there = parse_cluster(env["REPRISE_CLUSTER"], "REPRISE_CLUSTER")
    here = load_cluster(tmp_path / "cluster.toml", tmp_path)
    assert there.model_dump(exclude={"file"}) == here.model_dump(exclude={"file"})


def test_the_pool_asks_for_everything_that_is_told(tmp_path: Path) -> None:
    pool = json.loads((ROOT / "deployments" / "k8s" / "base" / "pool.json").read_text())
    assert set(made(tmp_path, MORE)["job_variables"]) <= set(pool["variables"]["properties"])


def test_without_a_flow_image_the_pool_has_its_own(tmp_path: Path) -> None:
    assert "image" not in made(tmp_path)["job_variables"]


@pytest.mark.parametrize("key", ["entrypoint", "parameters", "work_pool", "concurrency_limit", "pull"])
def test_the_file_for_stock_prefect_says_the_same(tmp_path: Path, key: str) -> None:
    shipped = yaml.safe_load((ROOT / "deployments" / "prefect-cluster.yaml").read_text())
    (one,) = shipped["deployments"]
    body = made(tmp_path)
    same = {
        "entrypoint": (one["entrypoint"], body["entrypoint"]),
        "parameters": (set(one["parameters"]), set(body["parameters"])),
        "work_pool": (one["work_pool"]["name"], body["work_pool_name"]),
        "concurrency_limit": (one["concurrency_limit"]["limit"], body["concurrency_limit"]),
        "pull": (shipped["pull"], body["pull_steps"]),
    }
    assert same[key][0] == same[key][1]
    assert set(one["work_pool"]["job_variables"]["env"]) <= set(body["job_variables"]["env"])
