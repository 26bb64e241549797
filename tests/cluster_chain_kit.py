"""What the test of the whole chain on a cluster is made of: the command, what it left in the cluster, the overlay.

Fixtures and tests are in test_cluster_chain.py. Not covered: workloads without a flow (cluster_kit.py).
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deployments.kube_api import KubeApi
from deployments.serving import call
from tests.cluster_kit import apply

ROOT = Path(__file__).resolve().parents[1]
OVERLAY = ROOT / "deployments" / "k8s" / "overlays" / "kind"
RUNS, SERVICES = "reprise", "reprise-services"
AUTH = "reprise:chain"
DATABASES = {"prefect": "sqlite+aiosqlite:////home/prefect/prefect.db", "mlflow": "sqlite:////data/mlflow.db"}
CLUSTER = """
[place]
kind = "cluster"
[images]
{images}
[services]
prefect_outside = "http://{prefect}:4200"
[serving]
replicas = 1
[resources.train_model]
cpus = 0.5
memory = "3Gi"
[resources.serve]
cpus = 0.3
memory = "3Gi"
"""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The cluster with everything that a run needs, and a project."""

    api: KubeApi
    project: Path
    state: Path  # the state volume, as this machine sees it
    prefect: str
    mlflow: str

    def start(self, *arguments: str, command: str = "run") -> subprocess.Popen[str]:
        """`reprise run --place cluster`, or another command."""
        argv = [sys.executable, "-m", "flows", command, "--place", "cluster", *arguments]
        env = {**os.environ, "PREFECT_API_AUTH_STRING": AUTH, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            argv, cwd=self.project, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def reprise(self, command: str, *arguments: str) -> str:
        """What a command prints that succeeds."""
        process = self.start(*arguments, command=command)
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, out + err
        return out

    def run(self, *arguments: str) -> dict[str, Any]:
        """The document of a run that succeeds."""
        return document_of(self.start("--json", *arguments))

    def items(self, path: str, **labels: str) -> list[dict[str, Any]]:
        """Objects of the runs' namespace with all these labels of ours."""
        selector = ",".join(f"reprise.dev/{name}={value}" for name, value in labels.items())
        return list(self.api.get(f"/{path}", labelSelector=selector)["items"])

    def jobs(self, **labels: str) -> list[dict[str, Any]]:
        """Jobs of steps, and of flows with component=flow."""
        return self.items(f"apis/batch/v1/namespaces/{RUNS}/jobs", **labels)

    def trainings(self, key: str) -> list[dict[str, Any]]:
        """PyTorchJobs of one training."""
        return self.items(f"apis/kubeflow.org/v1/namespaces/{RUNS}/pytorchjobs", key=key[:12])

    def flow_pod(self) -> str:
        """The name of the flow's pod that runs; "" if there is none."""
        pods = self.items(f"api/v1/namespaces/{RUNS}/pods", component="flow")
        running = [p for p in pods if p["status"]["phase"] == "Running" and "deletionTimestamp" not in p["metadata"]]
        return str(running[0]["metadata"]["name"]) if running else ""

    def deployment(self) -> dict[str, Any] | None:
        """The served model's."""
        return self.api.find(f"/apis/apps/v1/namespaces/{RUNS}/deployments/serve-digits")

    def rollouts(self) -> int:
        """How many there were."""
        found = self.deployment() or {"metadata": {"annotations": {}}}
        return int(found["metadata"]["annotations"].get("deployment.kubernetes.io/revision", 0))

    def versions(self) -> list[str]:
        """Of the model in MLflow."""
        url = f"{self.mlflow}/api/2.0/mlflow/model-versions/search?filter=name%3D%27digits%27&max_results=1000"
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": "localhost:5000"})) as reply:
            return [v["version"] for v in json.load(reply).get("model_versions", ())]

    def predictions(self, document: dict[str, Any], count: int = 5) -> list[dict[str, Any]]:
        """What the Service answers to held-out samples; each is what the trained model answered."""
        address = self.api.get(f"/api/v1/namespaces/{RUNS}/services/serve-digits")["spec"]["clusterIP"]
        key = key_of(document, "train_model")
        rows = (self.state / "store" / "trainings" / key / "output" / "heldout.jsonl").read_text().splitlines()
        answers = []
        for row in map(json.loads, rows[:count]):
            body = base64.b64decode(row["body_b64"])
            answers.append(call("POST", f"http://{address}:8080/predictions/digits", body).document())
            assert answers[-1]["label"] == row["answer"]["label"]
        return answers


def document_of(process: subprocess.Popen[str], seconds: float = 700) -> dict[str, Any]:
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, f"exit code {process.returncode}\n{out}\n{err}"
    document: dict[str, Any] = json.loads(out)
    return document


def key_of(document: dict[str, Any], step: str) -> str:
    return str(next(s["key"] for s in document["steps"] if s["name"] == step))


def secret(api: KubeApi, namespace: str, name: str, values: dict[str, str]) -> None:
    item = {"kind": "Secret", "metadata": {"name": name, "namespace": namespace}, "stringData": values}
    apply(api, f"/api/v1/namespaces/{namespace}/secrets", item)


def kubectl(*arguments: str, stdin: str = "") -> str:
    done = subprocess.run(["kubectl", *arguments], input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def overlay() -> str:
    """The overlay as it is, but for a cluster of several nodes."""
    return adapted(kubectl("kustomize", str(OVERLAY)))


def adapted(built: str) -> str:
    """For a cluster of several nodes: the state volume is shared."""
    objects = list(yaml.safe_load_all(built))
    (claim,) = [o for o in objects if (o["kind"], o["metadata"]["name"]) == ("PersistentVolumeClaim", RUNS)]
    claim["spec"]["accessModes"] = ["ReadWriteMany"]
    return str(yaml.safe_dump_all(objects))


def address(api: KubeApi, service: str) -> str:
    return str(api.get(f"/api/v1/namespaces/{SERVICES}/services/{service}")["spec"]["clusterIP"])
