"""What the tests of serving on a cluster share: a namespace where a toy's versions are served.

Steps are real Jobs under the account and Role of deployments/k8s/base, in a namespace that enforces Pod Security
`restricted`; MLflow and TorchServe are real, under load (cluster_load.py). It needs the rig (cluster_kit.py),
because the state volume is looked into; elsewhere the tests skip. Not covered: the faults (test_cluster_serving*.py).
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from deployments.cluster import Cluster
from deployments.cluster_place import ClusterPlace
from deployments.cluster_target import ClusterTarget, in_service
from deployments.errors import TryAgain
from deployments.kube_api import APPLY_PATCH, KubeApi
from deployments.pod_template import pod_security
from deployments.serving import call
from deployments.workload import Outcome, Resources, Workload
from tasks.audit_endpoint import AuditRequest, audit_endpoint
from tasks.deploy_model import DeployRequest
from tasks.endpoint import EndpointRecord
from tasks.package_model import package_model
from tests.cluster_kit import cluster_images, needs_rig, rig_state
from tests.cluster_load import Load
from tests.tasks.serving_kit import MODULE, make_toy, package_request

BASE = Path(__file__).parents[1] / "deployments" / "k8s" / "base"
DIES = MODULE.replace("def build_model(params):", "def build_model(params):\n    import os; os._exit(7)")


@dataclass
class Home:
    """A namespace with everything that a served pipeline stands on."""

    api: KubeApi
    cluster: Cluster
    target: ClusterTarget
    shared: Path
    mlflow: str
    requests: dict[str, DeployRequest]
    right: dict[str, list[Any]]
    bodies: list[bytes]
    count: int = 0

    @property
    def record(self) -> EndpointRecord:
        return EndpointRecord(folder=str(self.shared / "store" / "endpoints"), pipeline="toy")

    def workload(self, request: object, command: tuple[str, ...], name: str = "") -> Workload:
        self.count += 1
        return Workload(
            name=name or f"deploy-{self.count}",
            image="step",
            command=command,
            request=asdict(request),  # type: ignore[call-overload]
            resources=Resources(cpus=0.1, memory="512Mi"),
            grace_seconds=60.0,
            labels={"step": "deploy_model", "pipeline": "toy", "key": f"k{self.count}"},
            account="deploy",
        )

    def deploy(self, request: DeployRequest) -> Outcome:
        """The step as the flow runs it."""
        wanted = self.workload(request, ("python", "-m", "tasks.step", "deploy_model", "{request}", "{result}"))
        return self.cluster.run(wanted)

    def load(self) -> Load:
        path = f"/api/v1/namespaces/{self.target.place.namespace}/services/serve-toy"
        return Load(f"http://{self.api.get(path)['spec']['clusterIP']}:8080", self.bodies, self.right)

    def revision(self) -> int:
        return int(self.deployment()["metadata"]["annotations"]["deployment.kubernetes.io/revision"])

    def deployment(self) -> dict[str, Any]:
        return self.api.get(f"/apis/apps/v1/namespaces/{self.target.place.namespace}/deployments/serve-toy")

    def holds(self, version: str) -> None:
        """Record, alias, Deployment and what answers are this version, and nothing is under way."""
        found = audit_endpoint(
            AuditRequest(
                pipeline="toy",
                tracking_uri=self.mlflow,
                record=self.record.folder,
                inference_url=self.load().url,
                cluster=replace(self.target, kubeconfig=os.environ["KUBECONFIG"]),
            )
        )
        assert found.findings == [] and (found.version, found.label) == (version, self.requests[version].label)
        assert self.record.read()["transaction"] is None
        looked = replace(self.target, kubeconfig=os.environ["KUBECONFIG"])
        assert in_service(looked, "toy") == self.requests[version].label


def apply(api: KubeApi, item: dict[str, Any], namespace: str) -> None:
    """Server-side apply of an object in this namespace."""
    plural = {"NetworkPolicy": "networkpolicies"}.get(item["kind"], item["kind"].lower() + "s")
    root = "apis" if "/" in item["apiVersion"] else "api"
    where = "" if item["kind"] == "Namespace" else f"/namespaces/{namespace}"
    path = f"/{root}/{item['apiVersion']}{where}/{plural}/{item['metadata']['name']}"
    query = {"fieldManager": "reprise-test", "force": "true"}
    api.request("PATCH", path, query=query, body=item, content_type=APPLY_PATCH)


def until(what: Callable[[], bool], seconds: float, why: str) -> None:
    give_up = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < give_up, why
        time.sleep(0.5)


def base(api: KubeApi, namespace: str) -> None:
    """Namespace, accounts and Roles as deployments/k8s/base has them, and a claim."""
    for file in ("namespaces", "accounts", "roles"):
        for item in yaml.safe_load_all((BASE / f"{file}.yaml").read_text()):
            meta = item["metadata"]
            if item["kind"].startswith("Cluster") or "reprise" not in (meta["name"], meta.get("namespace")):
                continue
            if item["kind"] == "Namespace":
                meta["name"] = namespace
            else:
                meta["namespace"] = namespace
            for subject in item.get("subjects", ()):
                subject["namespace"] = namespace
            apply(api, item, namespace)
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    meta = {"name": "reprise", "namespace": namespace}
    apply(api, {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": spec}, namespace)


def mlflow_server(api: KubeApi, place: ClusterPlace) -> str:
    """A real one in a pod; its address, for pods and for this machine."""
    argv = ["python", "-m", "mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--workers", "1"]
    argv += [
        "--backend-store-uri",
        "sqlite:////tmp/mlflow.db",
        "--serve-artifacts",
        "--artifacts-destination",
        "/tmp/a",
    ]
    secure = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    quiet = [{"name": "MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "value": "false"}]
    image = place.image("step")
    container = {"name": "mlflow", "image": image, "command": argv, "securityContext": secure, "env": quiet}
    meta = {"name": "mlflow", "namespace": place.namespace, "labels": {"app": "mlflow"}}
    spec = {"containers": [container], "securityContext": pod_security(place), "restartPolicy": "Always"}
    apply(api, {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}, place.namespace)
    service = {"selector": {"app": "mlflow"}, "ports": [{"port": 5000}]}
    apply(api, {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": service}, place.namespace)
    found = api.get(f"/api/v1/namespaces/{place.namespace}/services/mlflow")
    url = f"http://{found['spec']['clusterIP']}:5000/api/2.0/mlflow"

    def post(path: str, **body: Any) -> dict[str, Any]:
        try:
            made = call("POST", f"{url}/{path}", json.dumps(body).encode(), content_type="application/json")
        except TryAgain:
            return {}
        return made.document() if made.status == 200 else {}

    until(lambda: bool(post("registered-models/create", name="toy")), 300, "MLflow does not start")
    run = post("runs/create", experiment_id="0")["run"]["info"]
    for _ in range(6):
        assert post("model-versions/create", name="toy", source=f"{run['artifact_uri']}/m", run_id=run["run_id"])
    return url.removesuffix("/api/2.0/mlflow")


@contextmanager
def serving_home(api: KubeApi, folder: Path) -> Iterator[Home]:
    """Everything that the toy is served on; its archives are made in the folder."""
    needs_rig()
    namespace = f"reprise-serving-{os.getpid()}-{folder.name}"  # several homes in one process: each has its own
    base(api, namespace)
    shared = Path(f"/{namespace}")  # one path here and in the pods
    place = ClusterPlace(namespace=namespace, images=cluster_images(), state_mount=str(shared))
    state = rig_state() / "pvc" / f"{namespace}-reprise"
    url = mlflow_server(api, place)
    until(state.is_dir, 30, "the claim is not bound")
    os.chown(state, -1, place.user)
    state.chmod(0o2775)
    shared.mkdir()
    subprocess.run(["mount", "--bind", str(state), str(shared)], check=True)
    target = ClusterTarget(
        place=place,
        replicas=2,
        resources=Resources(cpus=0.2, memory="2Gi"),
        start_seconds=240.0,
        ready_seconds=1.0,
        patience_seconds=5.0,
        drain_seconds=4.0,
    )
    running = Home(api, Cluster(place, api=api, state=shared), target, shared, url, {}, {}, [])
    try:
        (shared / "store" / "models").mkdir(parents=True)
        fill(running, folder)
        for path in (shared / "store", *(shared / "store").rglob("*")):
            os.chown(path, place.user, place.user)
        yield running
    finally:
        running.cluster.close()
        api.delete(f"/api/v1/namespaces/{namespace}", propagation="Background")
        subprocess.run(["umount", "--lazy", str(shared)], check=False)
        shared.rmdir()


def fill(home: Home, folder: Path) -> None:
    """Versions 1 and 2 are good; 3 cannot be imported, 4 answers wrongly, 5 kills its worker, 6 is as 2."""
    modules = {3: "import no_such_package\n" + MODULE, 5: DIES}
    for number in range(1, 7):
        seed = 1 if number == 1 else 2
        toy = make_toy(folder / f"toy{number}", seed=seed, module=modules.get(number, MODULE), flipped=number == 4)
        packed = package_model(package_request(toy, home.shared / "store" / "models", number))
        heldout = home.shared / "store" / f"heldout-{number}.jsonl"
        heldout.write_bytes(toy.heldout.read_bytes())
        rows = [json.loads(line) for line in toy.heldout.read_text().splitlines()]
        home.bodies = [base64.b64decode(row["body_b64"]) for row in rows]
        home.right[str(number)] = [row["answer"]["label"] for row in rows]
        home.requests[str(number)] = DeployRequest(
            key=str(number) * 40,
            pipeline="toy",
            version=str(number),
            label=packed.label,
            mar=packed.mar,
            sha256=packed.sha256,
            serve={"response_timeout_seconds": 10, "workers": 1},
            golden=str(heldout),
            golden_count=10,
            soak_seconds=2.0,
            max_p95_seconds=10.0,  # two cores for everything here
            tracking_uri=home.mlflow,
            record=home.record.folder,
            cluster=home.target,
        )


def endpoint(outcome: Outcome) -> dict[str, Any]:
    assert outcome.cause == "complete" and outcome.result is not None, outcome.reason
    found: dict[str, Any] = outcome.result["result"]
    return found


def why(outcome: Outcome) -> str:
    assert outcome.cause == "user_error" and outcome.result is not None, outcome.reason
    return str(outcome.result["error"]["message"])
