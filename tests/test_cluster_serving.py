"""The deployment transaction on a real Kubernetes API, figures printed.

    KUBECONFIG=... pytest -m cluster -s tests/test_cluster_serving.py

Steps are real Jobs under the account and Role of deployments/k8s/base, in a namespace that enforces Pod Security
`restricted`; MLflow and TorchServe are real, under load from outside the pods. The nodes are the rig's beside the
repository (shared/rig, images of tests/cluster_images.py), because the state volume is looked into; elsewhere it skips.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.cluster import Cluster
from deployments.cluster_target import ClusterTarget, in_service
from deployments.errors import TryAgain
from deployments.kube_api import APPLY_PATCH, KubeApi
from deployments.kube_connect import connect
from deployments.manifests import ClusterPlace, pod_security
from deployments.serving import call
from deployments.workload import Outcome, Resources, Workload
from tasks.audit_endpoint import AuditRequest, audit_endpoint
from tasks.deploy_model import DeployRequest, RollbackRequest
from tasks.endpoint import EndpointRecord
from tasks.golden import percentile
from tasks.package_model import package_model
from tests.tasks.serving_kit import MODULE, make_toy, package_request

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
RIG = Path(__file__).parents[1].parent / "shared" / "rig"
BASE = Path(__file__).parents[1] / "deployments" / "k8s" / "base"
IMAGES = {"step": "reprise-step:dev", "train": "reprise-train:dev", "serve": "reprise-serve:dev"}
CLIENTS = 8
TRANSITIONS = 11  # of a rolling update, see tests/tasks/test_rolling_update.py

# A deploying step whose process is killed, or the archive changed, at its Nth transition. The main process of a
# container cannot be killed from within, so the step is its child.
AT = """
import json, os, signal, subprocess, sys
if sys.argv[1] != "child":
    code = open("/proc/self/cmdline").read().split(chr(0))[2]
    done = subprocess.run([sys.executable, "-c", code, "child", *sys.argv[1:]])
    sys.exit(137 if done.returncode == -signal.SIGKILL else done.returncode)
from tasks.deploy_model import deploy_model, run
from tasks.step import read_request
request = read_request(deploy_model, json.load(open(sys.argv[2])))
count = 0
def on_phase(phase):
    global count
    count += 1
    print(phase, flush=True)
    if sys.argv[3] == "tamper" and phase == "applying":
        with open(request.mar, "ab") as mar:
            mar.write(b"x")
    if sys.argv[3] == str(count):
        os.kill(os.getpid(), signal.SIGKILL)
run(request, on_phase)
"""
BACK = """
import json, sys
from tasks.deploy_model import RollbackRequest, roll_back
from tasks.step import from_json
print(roll_back(from_json(RollbackRequest, json.load(open(sys.argv[1])), where="rollback")).version, flush=True)
"""


@dataclass
class Load:
    """Golden requests without a pause from several threads; every answer is judged by the version that gave it."""

    url: str
    bodies: list[bytes]
    right: dict[str, list[Any]]  # version -> label per body
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)

    def __enter__(self) -> Load:
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(CLIENTS)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(35)

    def _run(self, number: int) -> None:
        while not self.stop.wait(0.05):
            number = (number + 1) % len(self.bodies)
            try:
                answer = call("POST", f"{self.url}/predictions/toy", self.bodies[number], timeout=30)
            except TryAgain as error:
                self.failures.append(str(error))
                continue
            self.seconds.append(answer.seconds)
            version = str(answer.document().get("model_version"))
            self.versions.add(version)
            if answer.status != 200 or answer.document().get("label") != self.right.get(version, [None] * 99)[number]:
                self.failures.append(f"{answer.status} {answer.body[:200]!r}")

    def told(self) -> str:
        p50, p99 = (1000 * percentile(self.seconds, share) for share in (0.5, 0.99))
        return (
            f"{len(self.seconds)} requests of {CLIENTS} clients, {len(self.failures)} failed, versions "
            f"{sorted(self.versions)}, p50 {p50:.0f} ms, p99 {p99:.0f} ms, max {1000 * max(self.seconds):.0f} ms"
        )


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

    def deploy_at(self, request: DeployRequest, what: str) -> tuple[Outcome, list[str]]:
        lines: list[str] = []
        wanted = self.workload(request, ("python", "-c", AT, "{request}", what))
        return self.cluster.run(wanted, on_line=lines.append), lines

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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("no KUBECONFIG: this needs a Kubernetes API")
    rig = Path(os.environ["KUBECONFIG"]).resolve().parent
    if not (rig / "cluster.json").is_file():
        pytest.skip("KUBECONFIG is not a rig's: nothing here can look into its state volume")
    api, namespace = connect(), f"reprise-serving-{os.getpid()}"
    base(api, namespace)
    shared = Path(f"/reprise-serving-{os.getpid()}")  # one path here and in the pods
    place = ClusterPlace(namespace=namespace, images=IMAGES, state_mount=str(shared))
    state = rig / "pvc" / f"{namespace}-reprise"
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
        fill(running, tmp_path_factory.mktemp("toys"))
        for folder in (shared / "store", *(shared / "store").rglob("*")):
            os.chown(folder, place.user, place.user)
        yield running
    finally:
        running.cluster.close()
        api.delete(f"/api/v1/namespaces/{namespace}", propagation="Background")
        api.close()
        subprocess.run(["umount", "--lazy", str(shared)], check=False)
        shared.rmdir()


DIES = MODULE.replace("def build_model(params):", "def build_model(params):\n    import os; os._exit(7)")


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


def test_a_first_version_then_a_second_under_load_and_back(home: Home) -> None:
    first = endpoint(home.deploy(home.requests["1"]))
    assert first["url"] == f"http://serve-toy.{home.target.place.namespace}:8080/predictions/toy"
    assert (first["version"], first["previous"], first["changed"]) == ("1", None, True)
    home.holds("1")
    with home.load() as load:
        time.sleep(3)
        second = endpoint(home.deploy(home.requests["2"]))
        time.sleep(3)
    assert (second["version"], second["previous"]) == ("2", "1")
    assert load.failures == [] and load.versions == {"1", "2"}
    home.holds("2")
    print(f"\nrolling update: {second['seconds']:.1f} s; {load.told()}")
    again = endpoint(home.deploy(home.requests["2"]))
    assert not again["changed"] and home.revision() == 2
    request = RollbackRequest(
        pipeline="toy", tracking_uri=home.mlflow, record=home.record.folder, cluster=home.target, soak_seconds=1.0
    )
    began = time.monotonic()
    with home.load() as load:
        back = home.cluster.run(home.workload(request, ("python", "-c", BACK, "{request}")))
    assert back.cause == "complete", back.reason
    assert load.failures == [] and load.versions == {"1", "2"}
    home.holds("1")
    print(f"rollback: {time.monotonic() - began:.1f} s; {load.told()}")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("does not load", "the model does not load: ModuleNotFoundError: No module named 'no_such_package'"),
        ("answers wrongly", "the model answers wrongly: sample-"),
        ("its worker dies", "the model does not load: 4 worker processes died"),
        ("crash loop", "container torchserve ends at each start (exit 1)"),
        ("image missing", "image nowhere.invalid/serve:none cannot be pulled"),
        ("no node fits", "no node has enough cpu free"),
    ],
)
def test_a_bad_version_is_undone_by_itself(home: Home, kind: str, reason: str) -> None:
    home.deploy(home.requests["1"])
    place, target = home.target.place, replace(home.target, start_seconds=10.0)
    requests = {
        "does not load": home.requests["3"],
        "answers wrongly": home.requests["4"],
        "its worker dies": home.requests["5"],
        "crash loop": replace(
            home.requests["6"],
            cluster=replace(home.target, place=replace(place, env={"REPRISE_HEAP": "none"})),
        ),
        "image missing": replace(
            home.requests["6"],
            cluster=replace(
                home.target, place=replace(place, images={**IMAGES, "serve": "nowhere.invalid/serve:none"})
            ),
        ),
        "no node fits": replace(
            home.requests["6"], cluster=replace(target, resources=Resources(cpus=10_000, memory="1Gi"))
        ),
    }
    began = time.monotonic()
    with home.load() as load:
        outcome = home.deploy(requests[kind])
        time.sleep(1)
    assert reason in why(outcome)
    assert load.failures == [] and load.versions == {"1"}
    home.holds("1")
    assert home.record.read()["history"][-1]["outcome"] == "rolled back"
    print(f"\n{kind}: undone after {time.monotonic() - began:.1f} s: {why(outcome)[:160]}\n  {load.told()}")


def test_an_archive_that_is_not_the_one_packaged(home: Home) -> None:
    home.deploy(home.requests["1"])
    revision = home.revision()
    assert "packaged was 000" in why(home.deploy(replace(home.requests["6"], sha256="0" * 64)))
    assert home.revision() == revision  # refused before anything was applied
    began, mar = time.monotonic(), Path(home.requests["6"].mar)
    good = mar.read_bytes()
    with home.load() as load:
        outcome, lines = home.deploy_at(home.requests["6"], "tamper")
    mar.write_bytes(good)
    assert outcome.cause == "user_error" and "(exit 4)" in outcome.reason and "packaged was" in outcome.reason
    assert load.failures == [] and load.versions == {"1"} and "reconciled" in lines
    home.holds("1")
    print(f"\ndigest: undone after {time.monotonic() - began:.1f} s; {load.told()}")


@pytest.mark.parametrize("number", range(1, TRANSITIONS + 1), ids=lambda number: f"transition-{number}")
def test_a_step_that_is_killed_and_run_again_is_one_rollout(home: Home, number: int) -> None:
    one = {name: replace(request, cluster=replace(home.target, replicas=1)) for name, request in home.requests.items()}
    before, after = "12" if number % 2 else "21"
    endpoint(home.deploy(one[before]))
    revision = home.revision()
    with home.load() as load:
        killed, lines = home.deploy_at(one[after], str(number))
        again = endpoint(home.deploy(one[after]))
    assert killed.exit_code == 137 and len(lines) == number, (killed.reason, lines)
    assert again["version"] == after and home.revision() == revision + 1, lines[-1]
    home.holds(after)
    print(f"\nkilled at {lines[-1]}, then {again['seconds']:.1f} s; {load.told()}")
    assert load.failures == [] and load.versions <= {before, after}


def test_two_deployers_at_once(home: Home) -> None:
    endpoint(home.deploy(home.requests["1"]))
    found: dict[str, Outcome] = {}

    def one(version: str) -> None:
        found[version] = home.deploy(home.requests[version])

    with home.load() as load:
        threads = [threading.Thread(target=one, args=(version,)) for version in ("2", "6")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(900)
    assert {endpoint(outcome)["version"] for outcome in found.values()} == {"2", "6"}
    last = home.record.serving()
    assert last is not None and load.failures == [] and load.versions <= {"1", "2", "6"}
    home.holds(last.version)
    assert [row["outcome"] for row in home.record.read()["history"][-2:]] == ["in service"] * 2
    print(f"\ntwo at once: version {last.version} last; {load.told()}")


def test_an_autoscalers_number_of_replicas_survives_a_rollout(home: Home) -> None:
    endpoint(home.deploy(home.requests["1"]))
    path = f"/apis/apps/v1/namespaces/{home.target.place.namespace}/deployments/serve-toy/scale"
    scale = {"spec": {"replicas": 1}}
    home.api.request(
        "PATCH", path, query={"fieldManager": "hpa"}, body=scale, content_type="application/merge-patch+json"
    )
    endpoint(home.deploy(home.requests["2"]))
    assert home.deployment()["spec"]["replicas"] == 1
    home.holds("2")
