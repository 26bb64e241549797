"""`reprise run --place cluster` as a user types it: `KUBECONFIG=... pytest -m cluster tests/test_cluster_chain.py`.

From an empty cluster: the overlay deployments/k8s/overlays/kind (Prefect's server and its Kubernetes worker, MLflow,
the state volume), a project with its git and DVC remotes, then the command. The rest are kills of the flow's pod, one
in each step. Pods read the remotes from folders of this machine, so it needs the rig; on other clusters it skips.
Not covered: the Runner's own faults (test_cluster_faults.py), trainings (test_cluster_training.py).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster_place import ClusterPlace
from deployments.kube_api import ApiStatus, KubeApi
from flows.example import create_project
from flows.plan import STEPS
from flows.prefect_api import Prefect
from tests.cluster_chain_kit import (
    AUTH,
    CLUSTER,
    DATABASES,
    ROOT,
    RUNS,
    SERVICES,
    Chain,
    address,
    document_of,
    key_of,
    kubectl,
    overlay,
    secret,
)
from tests.cluster_kit import cluster_images, needs_rig, rig_state, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def services(api: KubeApi) -> Iterator[None]:
    """What the README says once: namespaces, Secrets, the overlay."""
    needs_rig()
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on the PATH: the overlay cannot be built")
    if api.find(f"/apis/apps/v1/namespaces/{SERVICES}/deployments/prefect-server") is not None:
        pytest.skip(f"namespace {SERVICES} is in use: this test needs one that it may remove")
    kubectl("apply", "--server-side", "-f", str(ROOT / "deployments" / "k8s" / "base" / "namespaces.yaml"))
    for namespace in (RUNS, SERVICES):
        secret(api, namespace, "prefect-auth", {"auth-string": AUTH})
    secret(api, SERVICES, "databases", DATABASES)
    kubectl("apply", "--server-side", "-f", "-", stdin=overlay())
    for name in ("prefect-server", "mlflow", "prefect-worker"):
        kubectl("-n", SERVICES, "rollout", "status", f"deployment/{name}", "--timeout=400s")
    yield
    for namespace in (RUNS, SERVICES):
        kubectl("delete", "namespace", namespace, "--timeout=120s")  # and wait: others make it anew


@pytest.fixture(scope="module")
def chain(api: KubeApi, services: None) -> Iterator[Chain]:
    """A project whose remotes pods see: not below /tmp, which is a volume of its own in them."""
    home = Path(f"/reprise-chain-{os.getpid()}")
    project, user = home / "digits", ClusterPlace(images={}).user
    create_project("digits", project)
    (project / ".dvc-remote").rename(home / "dvc")
    config = project / ".dvc" / "config"
    config.write_text(config.read_text().replace("../.dvc-remote", str(home / "dvc")))
    images = "\n".join(f'{kind} = "{name}"' for kind, name in cluster_images().items())
    (project / "cluster.toml").write_text(CLUSTER.format(images=images, prefect=address(api, "prefect")))
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
    for arguments in (
        ("init", "-q", "--bare", "-b", "main", str(home / "digits.git")),
        ("add", "-A"),
        (*identity, "commit", "-q", "-m", "for the cluster"),
        ("remote", "add", "origin", str(home / "digits.git")),
        ("push", "-q", "origin", "HEAD:main"),
    ):
        subprocess.run(["git", *arguments], cwd=project, check=True)
    for path in (home, *home.rglob("*")):
        if project not in (path, *path.parents):
            os.chown(path, user, user)
    yield Chain(
        api=api,
        project=project,
        state=rig_state() / "pvc" / f"{RUNS}-{RUNS}",
        prefect=f"http://{address(api, 'prefect')}:4200",
        mlflow=f"http://{address(api, 'mlflow')}:5000",
    )
    shutil.rmtree(home)


def test_from_the_command_to_a_prediction_through_the_service(chain: Chain) -> None:
    process = chain.start()
    out, err = process.communicate(timeout=700)
    assert process.returncode == 0, out + err
    assert [line.split()[1] for line in out.splitlines() if line.startswith("✓")] == list(STEPS)
    document = json.loads((chain.state / "store" / "runs" / "digits-1.json").read_text())
    assert (document["status"], document["place"], document["cause"]) == ("succeeded", "cluster", "command")
    for step in (*STEPS, "write_report"):
        if step != "train_model":
            (job,) = chain.jobs(run="digits-1", step=step)
            assert job["status"]["succeeded"] == 1, step
            account = "reprise-deploy" if step == "deploy_model" else "reprise-step"
            assert job["spec"]["template"]["spec"]["serviceAccountName"] == account
    (training,) = chain.trainings(key_of(document, "train_model"))
    assert {"Succeeded": "True"}.items() <= {c["type"]: c["status"] for c in training["status"]["conditions"]}.items()
    assert chain.versions() == ["1"] and chain.rollouts() == 1
    assert {a["model_version"] for a in chain.predictions(document)} == {"1"}
    assert document["check"]["agreement"] == 1.0


def test_again_nothing_runs(chain: Chain) -> None:
    before = len(chain.jobs(pipeline="digits"))
    document = chain.run()
    assert document["status"] == "unchanged"
    assert all(step["reused"] for step in document["steps"])
    assert len(chain.jobs(pipeline="digits")) == before and chain.rollouts() == 1


def killed_while(chain: Chain, step: str, kill: Callable[[str], None], *arguments: str) -> dict[str, Any]:
    """The document of a run whose flow lost its pod while the step's own pod ran."""
    process = chain.start("--json", *arguments)
    known = {j["metadata"]["uid"] for j in working(chain, step)}

    def runs() -> str:
        assert process.poll() is None, process.communicate()
        begun = [j for j in working(chain, step) if j["metadata"]["uid"] not in known]
        return chain.flow_pod() if begun else ""

    kill(until(runs, f"{step} is under way", 400))
    return document_of(process)


def another_training() -> tuple[str, ...]:
    """Settings of a model that was never trained, whatever its accuracy happens to be."""
    return ("--set", f"train.seed={int(time.time())}", "--set", "gate.tolerance=1")


def working(chain: Chain, step: str) -> list[dict[str, Any]]:
    """Jobs of the step, whatever their run, or trainings."""
    if step == "train_model":
        return chain.items(f"apis/kubeflow.org/v1/namespaces/{RUNS}/pytorchjobs", step=step)
    return chain.jobs(step=step)


def force(chain: Chain) -> Callable[[str], None]:
    """SIGKILL, no notice."""
    return lambda pod: chain.api.delete(f"/api/v1/namespaces/{RUNS}/pods/{pod}", grace=0)


def evict(chain: Chain) -> Callable[[str], None]:
    """As a drain does it: SIGTERM and a grace."""

    def eviction(pod: str) -> None:
        meta = {"name": pod, "namespace": RUNS}
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta}
        chain.api.request("POST", f"/api/v1/namespaces/{RUNS}/pods/{pod}/eviction", body=body)

    return eviction


KILLS = [*((step, force) for step in (*STEPS, "write_report")), ("train_model", evict), ("deploy_model", evict)]


@pytest.mark.parametrize(("step", "how"), KILLS, ids=lambda value: getattr(value, "__name__", value))
def test_a_flow_whose_pod_goes_during_a_step_goes_on(
    chain: Chain, step: str, how: Callable[[Chain], Callable[[str], None]]
) -> None:
    """One Job for each step, one version, one rollout, whenever it happens."""
    before = (len(chain.versions()), chain.rollouts())
    flows = {j["metadata"]["uid"] for j in flow_jobs(chain)}
    if step == "pull_data":
        shutil.rmtree(chain.state / "data")
    document = killed_while(chain, step, how(chain), *another_training())
    assert document["status"] == "succeeded" and document["resumed"] == 1
    run = document["run"]
    for name in STEPS:
        if name not in ("train_model", "pull_data") or name == step == "pull_data":
            (job,) = chain.jobs(run=run, step=name)
            assert job["status"]["succeeded"] == 1
    assert len(chain.trainings(key_of(document, "train_model"))) == len(chain.jobs(run=run, step="write_report")) == 1
    assert [a["cause"] for a in document["attempts"]] == ["complete"]
    assert (len(chain.versions()), chain.rollouts()) == (before[0] + 1, before[1] + 1)
    assert {a["model_version"] for a in chain.predictions(document)} == {document["model_version"]}
    (flow,) = [j for j in flow_jobs(chain) if j["metadata"]["uid"] not in flows]
    assert until(lambda: str(chain_status(chain, flow).get("succeeded", "")), "the flow's Job completes", 120) == "1"


def flow_jobs(chain: Chain) -> list[dict[str, Any]]:
    return list(
        chain.api.get(f"/apis/batch/v1/namespaces/{RUNS}/jobs", labelSelector="prefect.io/flow-run-id")["items"]
    )


def chain_status(chain: Chain, job: dict[str, Any]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = chain.api.get(f"/apis/batch/v1/namespaces/{RUNS}/jobs/{job['metadata']['name']}")
    except ApiStatus:
        return {}
    return dict(found["status"])


def test_ctrl_c_cancels_the_run_in_the_cluster_and_it_goes_on_later(chain: Chain) -> None:
    setting = (*another_training(), "--set", "train.epochs=60")
    process = chain.start(*setting)

    def trains() -> str:
        lines = [p.read_text() for p in (chain.state / "store" / "trainings").glob("*/progress.jsonl")]
        return "yes" if any('"max_steps": 2700' in text and text.count('"step"') > 5 for text in lines) else ""

    until(trains, "the training is under way", 400)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, out + err
    assert "cancelled" in err
    document = chain.run(*setting)
    assert [a["cause"] for a in document["attempts"]] == ["cancelled", "complete"]
    assert document["attempts"][1]["from_step"] > 0


def test_stock_prefect_deploy_registers_the_same(chain: Chain) -> None:
    from flows.prefect_api import FLOW

    os.environ["PREFECT_API_AUTH_STRING"] = AUTH
    try:
        prefect = Prefect(url=chain.prefect)
        made = prefect.deployment("digits")
        assert made is not None
        prefect.call("DELETE", f"/deployments/{made['id']}")
        env = {
            **os.environ,
            "PREFECT_API_URL": f"{chain.prefect}/api",
            "REPRISE_PIPELINE": "digits",
            "REPRISE_CLUSTER": (chain.project / "cluster.toml").read_text(),
            "REPRISE_GIT": str(chain.project.parent / "digits.git"),
        }
        file = ROOT / "deployments" / "prefect-cluster.yaml"
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(file)]
        done = subprocess.run([*command, "--all"], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        again = prefect.deployment("digits")
        assert again is not None and again["work_pool_name"] == "reprise"
        started = prefect.start(again["id"], parameters={"rev": "HEAD"}, name=FLOW, tags=[], idempotency_key="stock")

        def ended() -> str:
            state = (prefect.run(started["id"]) or {})["state"]
            return str(state["type"]) if state["type"] in ("COMPLETED", "FAILED", "CRASHED") else ""

        assert until(ended, "the flow run ends", 300) == "COMPLETED"
    finally:
        del os.environ["PREFECT_API_AUTH_STRING"]


def test_an_earlier_version_comes_back_and_the_newest_again(chain: Chain) -> None:
    other = str(chain.run(*another_training())["model_version"])
    newest = str(chain.run()["model_version"])
    for arguments, back in ([], other), (["--to", newest], newest):
        before = chain.rollouts()
        answer = json.loads(chain.reprise("rollback", *arguments, "--json"))
        assert answer["version"] == back and chain.rollouts() == before + 1
        assert served_version(chain) == back
    assert chain.run()["status"] == "unchanged", "what is in service is what the last run made"


def served_version(chain: Chain) -> str:
    deployment = chain.deployment()
    assert deployment is not None
    return str(deployment["spec"]["template"]["metadata"]["annotations"]["reprise.dev/version"])
