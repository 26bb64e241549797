"""What the cluster tests share: small workloads, runs in the background, nodes that are taken away.

Fixtures are in conftest.py. A cluster is whatever KUBECONFIG names; what takes nodes away and stops its API server is
the rig beside the repository, so tests of that skip elsewhere (`needs_rig`). Not covered: starting one (.ci/cluster).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster import Cluster
from deployments.kube_api import APPLY_PATCH, KubeApi
from deployments.workload import Outcome, Resources, Workload

RIG = Path(__file__).resolve().parents[2] / "shared" / "rig"
IMAGES = {
    "flow": "reprise-flow:dev",
    "step": "reprise-step:dev",
    "train": "reprise-train:dev",
    "serve": "reprise-serve:dev",
}
SMALL = Resources(cpus=0.05, memory="64Mi")
RESULT = "import json, sys; print('hello'); json.dump({'ok': True, 'result': 7}, open(sys.argv[1], 'w'))"
# Sleeps for ever at first; started again it ends at once.
HANG_ONCE = """
import pathlib, sys, time
mark = pathlib.Path(sys.argv[1]); again = mark.exists(); mark.touch()
print("up", again, flush=True)
time.sleep(0 if again else 300)
"""
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


def cluster_images() -> dict[str, str]:
    """By kind; REPRISE_CLUSTER_IMAGES, a JSON object, names others."""
    found: dict[str, str] = json.loads(os.environ.get("REPRISE_CLUSTER_IMAGES", json.dumps(IMAGES)))
    return found


def apply(api: KubeApi, collection: str, item: dict[str, Any]) -> None:
    """Create or change an object."""
    path = f"{collection}/{item['metadata']['name']}"
    query = {"fieldManager": "reprise-test", "force": "true"}
    api.request("PATCH", path, query=query, body={"apiVersion": "v1", **item}, content_type=APPLY_PATCH)


def make_namespace(api: KubeApi, name: str) -> None:
    """A namespace with what our pods need: their accounts and a ReadWriteMany claim."""
    meta, root = {"namespace": name}, f"/api/v1/namespaces/{name}"
    apply(api, "/api/v1/namespaces", {"kind": "Namespace", "metadata": {"name": name}})
    for account in ("reprise-step", "reprise-serve", "reprise-deploy"):
        apply(api, f"{root}/serviceaccounts", {"kind": "ServiceAccount", "metadata": {"name": account, **meta}})
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    claim = {"kind": "PersistentVolumeClaim", "metadata": {"name": "reprise", **meta}, "spec": spec}
    apply(api, f"{root}/persistentvolumeclaims", claim)


def rig_state() -> Path:
    """The folder of the rig whose kubeconfig is used."""
    return Path(os.environ["KUBECONFIG"]).resolve().parent


def is_rig() -> bool:
    """Whether KUBECONFIG is a rig's."""
    return RIG.is_dir() and (rig_state() / "cluster.json").is_file()


def needs_rig() -> None:
    """Skip where nothing can take a node away."""
    if not is_rig():
        pytest.skip("KUBECONFIG is not a rig's: nothing here can take a node or the API server away")


def reclaim(node: str, *how: str) -> subprocess.Popen[bytes]:
    """Take a node away, as the cloud does; another of its kind comes for it, under another name."""
    command = [sys.executable, str(RIG / "spot.py"), "--state", str(rig_state()), "reclaim", node, *how]
    return subprocess.Popen([*command, "--replace-after", "1"], cwd=RIG, stdout=subprocess.DEVNULL)


def step(name: str, code: str, *args: str, **more: Any) -> Workload:
    """A step that runs that Python code."""
    labels = {"run": "r", "pipeline": "digits", "step": "pull_data", "key": name[-12:]}
    more = {"grace_seconds": 3.0, "resources": SMALL, "labels": labels, **more}
    return Workload(name=name, image="step", command=("python", "-c", code, *args), **more)


def training(name: str, folder: str, steps: int, **more: Any) -> Workload:
    """An attempt of a training that counts to `steps`, ten a second, and remembers where it was."""
    more = {"spot": True, "grace_seconds": 5.0, "resources": SMALL, "labels": {"key": folder}, **more}
    command = ("python", "-c", TRAINER, f"/reprise/{folder}", str(steps))
    return Workload(name=name, image="train", command=command, **more)


class Background:
    """Something that is run in a thread of its own and tells lines."""

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
        """Wait for a line that has the text."""
        until = time.monotonic() + seconds
        while not any(text in line for line in self.lines):
            assert time.monotonic() < until and not self.found, f"no line {text!r}: {self.lines} {self.found}"
            time.sleep(0.05)

    def end(self, seconds: float = 120) -> Outcome:
        """Its outcome; raises what it raised."""
        self.thread.join(seconds)
        assert self.found, f"it still waits: {self.lines}"
        if isinstance(self.found[0], BaseException):
            raise self.found[0]
        outcome: Outcome = self.found[0]
        return outcome


def running_pods(cluster: Cluster, name: str) -> list[str]:
    """Names of the pods of a workload that have not ended."""
    return [p["metadata"]["name"] for p in cluster.pods_of(name) if p["status"]["phase"] in ("Pending", "Running")]


def node_of(cluster: Cluster, name: str, part: str = "") -> str:
    """Of the pod whose name has `part`, once it runs."""

    def found() -> str:
        for pod in cluster.pods_of(name):
            if part in pod["metadata"]["name"] and pod["status"]["phase"] == "Running":
                return str(pod["spec"]["nodeName"])
        return ""

    return until(found, f"a running pod of {name} {part}")


def until(found: Callable[[], str], what: str, seconds: float = 60) -> str:
    """What `found` gives, once it is not empty."""
    give_up = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < give_up, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)
    return answer
