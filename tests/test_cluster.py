"""The Runner on a real Kubernetes API with real controllers: `KUBECONFIG=... pytest -m cluster tests/test_cluster.py`.

The API is any with nodes labelled karpenter.sh/capacity-type, PyTorchJobs, a default ReadWriteMany storage class and
images reprise-step:dev and reprise-train:dev with Python (or those of REPRISE_CLUSTER_IMAGES, a JSON object). What
takes nodes away is the rig beside the repository (shared/rig); where KUBECONFIG is not a rig's, those tests skip.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster import Cluster
from deployments.cluster_serving import Rollouts, RolloutState
from deployments.errors import GiveUp, PreflightError, TryAgain
from deployments.kube_api import APPLY_PATCH, KubeApi, connect
from deployments.manifests import ClusterPlace, manifest
from deployments.serving import call
from deployments.serving_manifests import Serving, serving_objects
from deployments.workload import Outcome, Resources, Workload
from tasks.package_model import package_model
from tasks.records import Attempt, Store
from tasks.train_model import TrainRequest, train_model
from tests.tasks.serving_kit import make_toy, package_request
from training.spec import CheckpointPolicy, TrainSpec

pytestmark = pytest.mark.cluster
RIG = Path(__file__).parents[1].parent / "shared" / "rig"
IMAGES = {"step": "reprise-step:dev", "train": "reprise-train:dev", "serve": "reprise-serve:dev"}
SMALL = Resources(cpus=0.05, memory="64Mi")
TELL = """
import json, sys
n = json.load(open(sys.argv[1]))["n"]
open("/dev/termination-log", "w").write(json.dumps({"ok": True, "n": n}))
"""
FAIL_ONCE = """
import pathlib, sys
mark = pathlib.Path("/reprise/failed-once")
if not mark.exists():
    mark.touch(); sys.exit("broken")
"""
# Sleeps for ever at first; started again it ends at once.
HANG_ONCE = """
import pathlib, sys, time
mark = pathlib.Path(sys.argv[1]); again = mark.exists(); mark.touch()
print("up", again, flush=True)
time.sleep(0 if again else 300)
"""
RESULT = "import json, sys; print('hello'); json.dump({'ok': True, 'result': 7}, open(sys.argv[1], 'w'))"
# Counts on the state volume; told to leave it saves and exits 143, as the trainer's wrapper does.
TRAINER = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True)
mark, steps = folder / os.environ.get("RANK", "0"), int(sys.argv[2])
step = int(mark.read_text()) if mark.exists() else 0
print("starts at", step, flush=True)
def leave(*_):
    mark.write_text(str(step)); print("saved", step, flush=True); sys.exit(143)
signal.signal(signal.SIGTERM, leave)
while step < steps:
    time.sleep(0.1); step += 1
mark.write_text(str(step))
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def api() -> Iterator[KubeApi]:
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("no KUBECONFIG: this needs a Kubernetes API")
    connection = connect()
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def place(api: KubeApi) -> Iterator[ClusterPlace]:
    name = f"reprise-test-{os.getpid()}"
    meta = {"namespace": name}
    apply(api, "/api/v1/namespaces", {"kind": "Namespace", "metadata": {"name": name}})
    root = f"/api/v1/namespaces/{name}"
    for account in ("reprise-step", "reprise-serve", "reprise-deploy"):
        apply(api, f"{root}/serviceaccounts", {"kind": "ServiceAccount", "metadata": {"name": account, **meta}})
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    claim = {"kind": "PersistentVolumeClaim", "metadata": {"name": "reprise", **meta}, "spec": spec}
    apply(api, f"{root}/persistentvolumeclaims", claim)
    images = json.loads(os.environ.get("REPRISE_CLUSTER_IMAGES", json.dumps(IMAGES)))
    yield ClusterPlace(namespace=name, images=images, node_loss_seconds=5)
    api.delete(f"/api/v1/namespaces/{name}")


@pytest.fixture
def cluster(api: KubeApi, place: ClusterPlace) -> Iterator[Cluster]:
    state = rig_state() / "pvc" / f"{place.namespace}-reprise" if is_rig() else None
    if state is not None:
        until = time.monotonic() + 20
        while not state.is_dir() and time.monotonic() < until:  # bound by its first pod where the class waits for it
            time.sleep(0.2)
        os.chown(state, -1, place.user)  # what fsGroup does to the volume of a flow's pod
        state.chmod(0o2775)
    running = Cluster(place, api=api, state=state, start_patience=8.0)
    yield running
    running.close()


def apply(api: KubeApi, collection: str, item: dict[str, Any]) -> None:
    path = f"{collection}/{item['metadata']['name']}"
    query = {"fieldManager": "reprise-test", "force": "true"}
    api.request("PATCH", path, query=query, body={"apiVersion": "v1", **item}, content_type=APPLY_PATCH)


def rig_state() -> Path:
    return Path(os.environ["KUBECONFIG"]).resolve().parent


def is_rig() -> bool:
    return RIG.is_dir() and (rig_state() / "cluster.json").is_file()


def needs_rig() -> None:
    if not is_rig():
        pytest.skip("KUBECONFIG is not a rig's: nothing here can take a node away")


def reclaim(node: str, *how: str) -> subprocess.Popen[bytes]:
    """Take a node away, as the cloud does; another of its kind comes for it, under another name."""
    command = [sys.executable, str(RIG / "spot.py"), "--state", str(rig_state()), "reclaim", node, *how]
    return subprocess.Popen([*command, "--replace-after", "1"], cwd=RIG, stdout=subprocess.DEVNULL)


def step(name: str, code: str, *args: str, **more: Any) -> Workload:
    labels = {"run": "r", "pipeline": "digits", "step": "pull_data", "key": name[-12:]}
    more = {"grace_seconds": 3.0, "resources": SMALL, "labels": labels, **more}
    return Workload(name=name, image="step", command=("python", "-c", code, *args), **more)


def training(name: str, folder: str, steps: int, **more: Any) -> Workload:
    more = {"spot": True, "grace_seconds": 5.0, "resources": SMALL, "labels": {"key": folder}, **more}
    command = ("python", "-c", TRAINER, f"/reprise/{folder}", str(steps))
    return Workload(name=name, image="train", command=command, **more)


class Background:
    """A run in a thread of its own."""

    def __init__(self, cluster: Cluster, workload: Workload) -> None:
        self.lines: list[str] = []
        self.found: list[Any] = []

        def run() -> None:
            try:
                self.found.append(cluster.run(workload, on_line=self.lines.append))
            except BaseException as error:
                self.found.append(error)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def until_line(self, text: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not any(text in line for line in self.lines):
            assert time.monotonic() < until and not self.found, f"no line {text!r}: {self.lines} {self.found}"
            time.sleep(0.05)

    def end(self, seconds: float = 120) -> Outcome:
        self.thread.join(seconds)
        assert self.found, f"it still waits: {self.lines}"
        if isinstance(self.found[0], BaseException):
            raise self.found[0]
        outcome: Outcome = self.found[0]
        return outcome


def running_pods(cluster: Cluster, name: str) -> list[str]:
    return [p["metadata"]["name"] for p in cluster.pods_of(name) if p["status"]["phase"] in ("Pending", "Running")]


def node_of(cluster: Cluster, name: str, part: str = "") -> str:
    """Of the pod whose name has `part`, once it runs."""
    until = time.monotonic() + 60
    while True:
        for pod in cluster.pods_of(name):
            if part in pod["metadata"]["name"] and pod["status"]["phase"] == "Running":
                return str(pod["spec"]["nodeName"])
        assert time.monotonic() < until, "the pod does not run"
        time.sleep(0.2)


def test_the_server_takes_every_golden_as_it_is(api: KubeApi, place: ClusterPlace) -> None:
    import yaml

    for path in sorted((Path(__file__).parent / "golden").glob("*.yaml")):
        for item in yaml.safe_load_all(path.read_text()):
            item["metadata"]["namespace"] = place.namespace
            plural = {"PodDisruptionBudget": "poddisruptionbudgets"}.get(item["kind"], item["kind"].lower() + "s")
            version = item["apiVersion"]
            root = f"/{'apis' if '/' in version else 'api'}/{version}/namespaces/{place.namespace}/{plural}"
            made = api.request("POST", root, query={"dryRun": "All", "fieldValidation": "Strict"}, body=item)
            assert made["metadata"]["name"] == item["metadata"]["name"]


def test_a_step(cluster: Cluster) -> None:
    lines: list[str] = []
    outcome = cluster.run(step("a-step", RESULT, "{result}"), on_line=lines.append)
    assert (outcome.cause, outcome.exit_code, outcome.adopted) == ("complete", 0, False)
    assert lines == ["hello"] and outcome.node
    if cluster.state is not None:
        assert outcome.result == {"ok": True, "result": 7}
        assert Path(outcome.log).read_text() == "hello\n"
    assert cluster.run(step("a-step", RESULT, "{result}")).adopted
    assert list(cluster.logs("a-step")) == ["hello"]
    with pytest.raises(GiveUp, match="expected other"):
        cluster.run(step("a-step", RESULT, labels={"key": "other"}))


def test_a_step_reads_its_request_and_tells_by_termination_message(cluster: Cluster) -> None:
    blind = Cluster(cluster.settings, api=cluster.api)
    blind.state = None  # as from a machine without the volume
    outcome = blind.run(step("by-message", TELL, "{request}", request={"n": 41, "text": "é\n$(HOME) {x}"}))
    assert outcome.result == {"ok": True, "n": 41}
    blind.close()


def test_a_failed_step_is_started_anew(cluster: Cluster) -> None:
    first = cluster.run(step("again", FAIL_ONCE))
    assert (first.cause, first.exit_code) == ("user_error", 1) and "broken" in first.reason
    second = cluster.run(step("again", FAIL_ONCE))
    assert (second.cause, second.adopted) == ("complete", False)


def test_an_image_that_is_nowhere(cluster: Cluster, place: ClusterPlace) -> None:
    broken = Cluster(
        ClusterPlace(namespace=place.namespace, images={"step": "nowhere.invalid/x:1"}),
        api=cluster.api,
        start_patience=2.0,
    )
    with pytest.raises(PreflightError, match=r"nowhere.invalid/x:1 cannot be pulled"):
        broken.run(step("no-image", RESULT))
    there = broken.api.find(broken.object_path("step", "no-image"))
    assert there is None or there["metadata"]["deletionTimestamp"]
    broken.close()


def test_a_step_that_fits_nowhere(cluster: Cluster) -> None:
    wanted = step("too-big", RESULT, resources=Resources(cpus=10_000, memory="1Gi"), start_seconds=7.0)
    lines: list[str] = []
    outcome = cluster.run(wanted, on_line=lines.append)
    assert outcome.cause == "no_capacity" and "Insufficient cpu" in outcome.reason
    assert any("waiting: no node fits" in line for line in lines)


def test_out_of_memory(cluster: Cluster) -> None:
    wanted = step("too-much", "x = bytearray(300 << 20); print(len(x))", resources=Resources(cpus=0.05, memory="40Mi"))
    outcome = cluster.run(wanted)
    assert (outcome.cause, outcome.exit_code) == ("out_of_memory", 137), outcome.reason


def test_deadline_and_stop(cluster: Cluster) -> None:
    sleep = "import time; print('up', flush=True); time.sleep(300)"
    outcome = cluster.run(step("late", sleep, deadline_seconds=3.0, grace_seconds=1.0))
    assert outcome.cause == "deadline" and running_pods(cluster, "late") == []
    run = Background(cluster, step("stopped", sleep, grace_seconds=20.0))
    run.until_line("up")
    began = time.monotonic()
    cluster.stop("stopped", grace_seconds=1)
    assert time.monotonic() - began < 15 and running_pods(cluster, "stopped") == []
    assert run.end().cause == "cancelled"
    cluster.stop("stopped")


def test_a_job_deleted_by_hand_is_made_again(cluster: Cluster) -> None:
    run = Background(cluster, step("by-hand", HANG_ONCE, "/reprise/by-hand", grace_seconds=1.0))
    run.until_line("up False")
    cluster.api.delete(cluster.object_path("step", "by-hand"), propagation="Background")
    outcome = run.end()
    assert outcome.cause == "complete" and any("deleted by somebody's hand" in line for line in run.lines)


def test_an_evicted_step_starts_again_in_the_same_job(cluster: Cluster) -> None:
    run = Background(cluster, step("evicted", HANG_ONCE, "/reprise/evicted", grace_seconds=1.0))
    run.until_line("up False")
    pod = running_pods(cluster, "evicted")[0]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
    cluster.api.request("POST", f"{cluster.pod_path(pod)}/eviction", body=eviction)
    outcome = run.end()
    assert outcome.cause == "complete" and any("up True" in line for line in run.lines)


def test_a_suspended_job_waits(cluster: Cluster) -> None:
    wanted = step("held", RESULT, "{result}")
    item = manifest(wanted, cluster.settings)
    item["spec"]["suspend"] = True
    path = cluster.object_path("step", "held")
    cluster.api.request("POST", cluster.object_path("step", ""), body=item)
    run = Background(cluster, wanted)
    run.until_line("suspended")
    cluster.api.request("PATCH", path, body={"spec": {"suspend": False}}, content_type="application/merge-patch+json")
    assert run.end().cause == "complete"


def test_least_privilege_is_enough_and_less_is_told(cluster: Cluster, place: ClusterPlace, tmp_path: Path) -> None:
    """The Role that a flow's pod needs to run steps and trainings; nodes cannot be read, and nothing else either."""
    namespace, rbac = place.namespace, f"/apis/rbac.authorization.k8s.io/v1/namespaces/{place.namespace}"
    token = role(cluster.api, namespace, rbac, RULES)
    mine = Cluster(place, api=as_account(cluster.api, token, tmp_path), state=cluster.state)
    outcome = mine.run(step("by-role", RESULT, "{result}"))
    assert outcome.cause == "complete" and outcome.capacity == "on-demand"
    assert mine.run(training("train-role-1", "role", 2)).cause == "complete"
    mine.stop("by-role")
    role(cluster.api, namespace, rbac, [rule for rule in RULES if "jobs" not in rule["resources"]])
    with pytest.raises(PreflightError, match=r'"resources": \["jobs"\], "verbs": \["(list|create)"\]'):
        Cluster(place, api=as_account(cluster.api, token, tmp_path)).run(step("no-role", RESULT))
    mine.close()


RULES: list[dict[str, Any]] = [
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "list", "watch", "patch", "delete"]},
    {
        "apiGroups": ["kubeflow.org"],
        "resources": ["pytorchjobs"],
        "verbs": ["create", "get", "list", "watch", "patch", "delete"],
    },
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "delete"]},
    {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["list"]},
]


def role(api: KubeApi, namespace: str, rbac: str, rules: list[dict[str, Any]]) -> str:
    """An account with these rules; returns a token of it."""
    meta = {"name": "flow", "namespace": namespace}
    version = {"apiVersion": "rbac.authorization.k8s.io/v1"}
    apply(api, f"/api/v1/namespaces/{namespace}/serviceaccounts", {"kind": "ServiceAccount", "metadata": meta})
    apply(api, f"{rbac}/roles", {**version, "kind": "Role", "metadata": meta, "rules": rules})
    subject = {"kind": "ServiceAccount", **meta}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "flow"}
    binding = {**version, "kind": "RoleBinding", "metadata": meta, "subjects": [subject], "roleRef": reference}
    apply(api, f"{rbac}/rolebindings", binding)
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/flow/token"
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    return str(api.request("POST", path, body=asked)["status"]["token"])


def as_account(api: KubeApi, token: str, folder: Path) -> KubeApi:
    """The same API server, asked with a token."""
    import yaml

    path = folder / "account.kubeconfig"
    document = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    document["users"] = [{"name": user["name"], "user": {"token": token}} for user in document["users"]]
    path.write_text(yaml.safe_dump(document))
    return connect(kubeconfig=str(path))


def test_an_api_server_that_stops_for_a_while(cluster: Cluster) -> None:
    needs_rig()
    pid = json.loads((rig_state() / "pids" / "kube-apiserver.json").read_text())["pid"]
    code = "import time; print('up', flush=True); time.sleep(6); print('over')"
    run = Background(cluster, step("through-it", code))
    run.until_line("up")
    os.kill(pid, signal.SIGSTOP)  # it holds its connections and answers nothing
    try:
        time.sleep(10)
    finally:
        os.kill(pid, signal.SIGCONT)
    outcome = run.end()
    assert outcome.cause == "complete" and run.lines[-1] == "over"


# --- attempts of a training


def test_an_attempt_of_two_nodes(cluster: Cluster) -> None:
    outcome = cluster.run(training("train-two-1", "two", 5, replicas=2))
    assert (outcome.cause, outcome.exit_code) == ("complete", 0), outcome.reason
    assert outcome.capacity == "spot"


def test_an_attempt_reclaimed_with_notice(cluster: Cluster) -> None:
    needs_rig()
    run = Background(cluster, training("train-notice-1", "notice", 100_000))
    run.until_line("starts at 0")
    node = node_of(cluster, "train-notice-1")
    told = time.time()
    spot = reclaim(node, "--notice", "20")
    outcome = run.end()
    spot.wait(60)
    assert (outcome.cause, outcome.exit_code, outcome.node) == ("spot", 143, node), outcome.reason
    assert outcome.notice is not None and abs(outcome.notice - told) < 5
    assert any("saved" in line for line in run.lines)
    again = cluster.run(training("train-notice-1", "notice", 100_000))
    assert (again.cause, again.adopted) == ("spot", True)
    resumed = Background(cluster, training("train-notice-2", "notice", 100_000))
    resumed.until_line("starts at")
    assert "starts at 0" not in resumed.lines
    cluster.stop("train-notice-2")
    assert resumed.end().cause == "cancelled"


def test_a_worker_reclaimed_without_notice_ends_the_attempt_and_its_peers_save(cluster: Cluster) -> None:
    needs_rig()
    run = Background(cluster, training("train-lost-1", "lost", 100_000, replicas=2))
    run.until_line("starts at 0")
    node = node_of(cluster, "train-lost-1", "worker-0")
    spot = reclaim(node, "--no-notice")
    outcome = run.end(180)
    spot.wait(60)
    assert (outcome.cause, outcome.node, outcome.notice) == ("node_lost", node, None), outcome.reason
    assert any("saved" in line for line in run.lines)  # the master was told to leave
    assert running_pods(cluster, "train-lost-1") == []


def test_a_bug_of_a_training(cluster: Cluster) -> None:
    wanted = training("train-bug-1", "bug", 1)
    outcome = cluster.run(
        Workload(
            name=wanted.name,
            image="train",
            command=("python", "-c", "raise ValueError('no')"),
            resources=SMALL,
            labels=wanted.labels,
        )
    )
    assert (outcome.cause, outcome.exit_code) == ("user_error", 1) and "ValueError: no" in outcome.reason


def test_a_pytorchjob_deleted_by_hand_is_made_again(cluster: Cluster) -> None:
    run = Background(cluster, training("train-hand-1", "hand", 30))
    run.until_line("starts at 0")
    cluster.api.delete(cluster.object_path("train", "train-hand-1"), propagation="Background")
    outcome = run.end()
    assert outcome.cause == "complete", outcome.reason
    assert sum("starts at" in line for line in run.lines) == 2, run.lines


def test_no_spot_capacity(cluster: Cluster, place: ClusterPlace) -> None:
    nowhere = Cluster(replace(place, spot_selector={"karpenter.sh/capacity-type": "none"}), api=cluster.api)
    outcome = nowhere.run(training("train-none-1", "none", 1, start_seconds=6.0))
    assert outcome.cause == "no_capacity" and "karpenter.sh/capacity-type=none" in outcome.reason
    nowhere.close()


@pytest.fixture
def shared(cluster: Cluster) -> Iterator[Path]:
    """The state volume under one path here and in the pods."""
    needs_rig()
    assert cluster.state is not None
    path = Path(f"/reprise-test-{os.getpid()}")  # not below /tmp, which is a volume of its own in the pods
    path.mkdir()
    subprocess.run(["mount", "--bind", str(cluster.state), str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)
    path.rmdir()


def test_the_real_trainer_through_two_reclaims_gives_the_same_weights(
    cluster: Cluster, place: ClusterPlace, shared: Path
) -> None:
    home = Cluster(replace(place, state_mount=str(shared)), api=cluster.api, state=shared)
    module = Path(__file__).parent / "training" / "modules" / "tiny.py"
    store = Store(root=str(shared / "store"))

    def request(key: str, slow: float) -> TrainRequest:
        folder = shared / key
        for made in (folder, folder / "output", folder / "checkpoints"):
            made.mkdir(exist_ok=True)
            made.chmod(0o2775)
        spec = TrainSpec(
            key=key * 40,
            pipeline="tiny",
            module=str(module),
            data=str(shared),
            checkpoints=f"file://{folder}/checkpoints",
            output=str(folder / "output"),
            progress=str(folder / "progress.jsonl"),
            epochs=10,
            batch_size=12,
            params={"slow": slow},
            checkpoint=CheckpointPolicy(every_steps=5),
        )
        wanted = Resources(cpus=0.2, memory="3Gi")
        return TrainRequest(spec=spec, experiment="t", workers=2, grace_seconds=20, resources=wanted)

    quiet = train_model(request("a", 0.0), runner=home, store=store)
    assert (quiet.attempts, quiet.steps) == (1, 80)

    takers: list[subprocess.Popen[bytes]] = []
    at = {1: ("--notice", "30"), 2: ("--no-notice",)}

    def taker(number: int) -> None:
        """Takes the node of an attempt when it has trained some steps."""
        name, progress = f"train-{'b' * 12}-{number}", shared / "b" / "progress.jsonl"
        before = progress.stat().st_size if progress.exists() else 0
        until = time.monotonic() + 120
        while time.monotonic() < until:
            text = progress.read_text()[before:] if progress.exists() else ""
            if text.count('"step"') > 12:
                takers.append(reclaim(node_of(home, name), *at[number]))
                return
            time.sleep(0.1)

    def on_attempts(attempts: list[Attempt]) -> None:
        if attempts[-1].ended is None and attempts[-1].number in at:
            threading.Thread(target=taker, args=(attempts[-1].number,), daemon=True).start()

    taken = train_model(request("b", 0.03), runner=home, store=store, on_attempts=on_attempts)
    for process in takers:
        process.wait(90)
    rows = store.attempts("b" * 40)
    print([(r.cause, r.exit_code, r.from_step, r.to_step, r.node, r.reason) for r in rows])
    assert [r.cause for r in rows] == ["spot", "node_lost", "complete"]
    assert rows[0].exit_code == 143 and rows[0].to_step == rows[0].reached_step  # it saved on notice
    assert (taken.weights_sha256, taken.metrics) == (quiet.weights_sha256, quiet.metrics)
    home.close()


# --- serving


class Load:
    """Golden requests without a pause from several threads; what went wrong is kept."""

    def __init__(self, url: str, rows: list[dict[str, Any]], threads: int = 2) -> None:
        self.url, self.rows, self.answers, self.failures = url, rows, 0, list[str]()
        self.versions: set[str] = set()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(0.02):
            row = self.rows[number % len(self.rows)]
            number += 1
            try:
                answer = call("POST", f"{self.url}/predictions/toy", base64.b64decode(row["body_b64"]), timeout=30)
            except TryAgain as error:
                self.failures.append(str(error))
                continue
            self.answers += 1
            document = answer.document()
            if answer.status != 200 or document.get("label") != row["answer"]["label"]:
                self.failures.append(f"{answer.status} {document}")
            self.versions.add(str(document.get("model_version")))

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(35)


def test_a_rolling_update_and_a_bad_version_lose_no_request(
    cluster: Cluster, place: ClusterPlace, tmp_path: Path
) -> None:
    needs_rig()
    assert cluster.state is not None
    toy = make_toy(tmp_path / "toy")
    models = cluster.state / "models"
    models.mkdir()
    (cluster.state / "heldout.jsonl").write_text(toy.heldout.read_text())
    rollouts = Rollouts(cluster.api, place.namespace)

    def serving(version: int, flipped: bool = False) -> Serving:
        made = make_toy(tmp_path / f"toy{version}", flipped=flipped) if flipped else toy
        packed = package_model(package_request(made, models, version))
        return Serving(
            pipeline="toy",
            version=str(version),
            label=packed.label,
            mar=f"/reprise/models/{Path(packed.mar).name}",
            sha256=packed.sha256,
            golden="/reprise/heldout.jsonl",
            replicas=1,
            resources=Resources(cpus=0.2, memory="3Gi"),
            response_timeout=10,
            drain_seconds=4,
            soak_seconds=1,
        )

    def deploy(wanted: Serving) -> RolloutState:
        for item in serving_objects(wanted, place):
            rollouts.apply(item)
        return rollouts.wait(wanted.name, seconds=240, on_change=print)

    first = deploy(serving(1))
    assert first.complete, first.reason
    service = cluster.api.get(f"/api/v1/namespaces/{place.namespace}/services/serve-toy")
    rows = [json.loads(line) for line in toy.heldout.read_text().splitlines()]
    load = Load(f"http://{service['spec']['clusterIP']}:8080", rows)
    try:
        second = deploy(serving(2))
        assert second.complete and second.revision > first.revision, second.reason
        third = deploy(serving(3, flipped=True))
        assert third.failed and "answers wrongly" in third.reason, third.reason
        assert rollouts.undo("serve-toy") == second.revision
        back = rollouts.wait("serve-toy", seconds=120)
        assert back.complete, back.reason
        time.sleep(2)
    finally:
        load.stop()
    assert load.failures == [] and load.answers > 100
    assert load.versions == {"1", "2"}  # never the bad one
    print(f"{load.answers} requests, {len(load.failures)} failed")


def test_an_archive_that_is_not_the_one_packaged_is_never_served(cluster: Cluster, place: ClusterPlace) -> None:
    needs_rig()
    assert cluster.state is not None
    (cluster.state / "tampered.mar").write_bytes(b"PK")
    wanted = Serving(
        pipeline="tampered",
        version="1",
        label="1.0",
        mar="/reprise/tampered.mar",
        sha256="0" * 64,
        golden="/reprise/none",
        replicas=1,
        resources=Resources(cpus=0.05, memory="64Mi"),
    )
    rollouts = Rollouts(cluster.api, place.namespace)
    for item in serving_objects(wanted, place):
        rollouts.apply(item)
    state = rollouts.wait(wanted.name, seconds=120)
    assert state.failed and "packaged was 000" in state.reason, state.reason
    with pytest.raises(GiveUp, match="no revision before 1"):
        rollouts.undo(wanted.name)
