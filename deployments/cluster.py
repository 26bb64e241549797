"""A Kubernetes cluster as a place: a Runner of Jobs and PyTorchJobs.

    Cluster(ClusterPlace(images={"step": ..., "train": ...}, namespace="reprise")).run(Workload(...))

Each workload is one object named like it. Asked about a name that
- runs, or is queued (suspended): it waits for its end;
- has succeeded: it answers with that outcome;
- is a step that failed: it is deleted and started anew;
- is an attempt of a training that has ended: it answers with that outcome, because attempts are counted.
For all workloads of a process there is one watch of Jobs, one of PyTorchJobs and one of Pods.
Not covered: how one workload is waited for (cluster_run.py), serving (cluster_serving.py), what lives long
(deployments/k8s). Needs a state volume that is mounted here too, else results come from termination messages only.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deployments.cluster_place import ClusterPlace
from deployments.cluster_run import ClusterRun
from deployments.errors import GiveUp, PreflightError, StepError, TryAgain
from deployments.guard import Guard
from deployments.job_status import end_of
from deployments.kube_api import MERGE_PATCH, PATIENCE, ApiStatus, KubeApi
from deployments.kube_connect import connect
from deployments.kube_watch import SharedWatch, uid_of
from deployments.labels import ENDING_ANNOTATION, WORKLOAD_LABEL
from deployments.manifests import manifest
from deployments.pod_causes import is_terminal
from deployments.pod_log import PodLog
from deployments.pod_template import CONTAINERS
from deployments.workload import Image, Outcome, Workload

Json = dict[str, Any]
STOPPED = "somebody stopped it"
POLL_SECONDS = 0.5


class Cluster:
    """Runs workloads as objects of a Kubernetes namespace; implements `Runner`."""

    place = "cluster"

    def __init__(
        self,
        settings: ClusterPlace,
        *,
        api: KubeApi | None = None,
        kubeconfig: str = "",
        context: str = "",
        state: Path | None = None,
        patience: float = PATIENCE,
        start_patience: float = 300.0,
        lost_node_seconds: float = 300.0,
        guard: bool = True,
    ) -> None:
        """Nothing is asked of the cluster yet.

        `state`: where this process sees the state volume (default: its mount path, if that is a folder here).
        Seconds: `patience` for an API server that is away, `start_patience` for an image that cannot be pulled,
        `lost_node_seconds` until a pod on a node that does not answer is given up. `guard`: look at the cluster before
        an object is made, and refuse one whose pods could never be placed.
        """
        self.settings = settings
        mount = Path(settings.state_mount)
        self.state = state or (mount if mount.is_dir() else None)
        self.start_patience, self.lost_node_seconds = start_patience, lost_node_seconds
        self._api = api
        self._connect = functools.partial(connect, kubeconfig=kubeconfig, context=context, patience=patience)
        self._lock = threading.Lock()
        self._watches: dict[str, SharedWatch] = {}
        self._guarded = guard
        self._guard: Guard | None = None

    @property
    def api(self) -> KubeApi:
        """The connection, made at its first use. Raises ConfigError without a usable kubeconfig."""
        with self._lock:
            if self._api is None:
                self._api = self._connect()
            return self._api

    @property
    def guard(self) -> Guard | None:
        """What looks before an object is made; None where nothing does. Raises as `api`."""
        api = self.api
        with self._lock:
            if self._guarded and self._guard is None:
                self._guard = Guard(api, self.settings)
            return self._guard

    def run(self, workload: Workload, *, on_line: Callable[[str], None] | None = None) -> Outcome:
        """Create or adopt `workload.name` and wait for its end; see the module's text for what a name that ended means.

        Raises GiveUp (a name that is taken, a manifest that is refused), PreflightError (a right, an image, a
        definition or a Secret is missing) or Unreachable (the API server stays away; the workload runs on).
        """
        wanted = manifest(workload, self.settings)
        event = threading.Event()
        with (
            self._watch(self.object_path(workload.image, "")).follow(workload.name, event) as objects,
            self._watch(self.pod_path("")).follow(workload.name, event) as pods,
        ):
            return ClusterRun(self, workload, wanted, objects, pods, event, on_line).outcome()

    def stop(self, name: str, *, grace_seconds: float | None = None) -> None:
        """End it: SIGTERM, then SIGKILL after the grace (default: its own). Returns when nothing of it runs.

        Raises TryAgain if its pods are still there long after that (their node does not answer).
        """
        path, item = self._find(name)
        if item is None:
            return
        if end_of(item) is None:
            note = {"metadata": {"annotations": {ENDING_ANNOTATION: STOPPED}}}
            with contextlib.suppress(ApiStatus):
                self.api.request("PATCH", path, body=note, content_type=MERGE_PATCH)
            self.api.delete(path, uid=uid_of(item))
        longest = 0.0
        for pod in self._running(name):
            own = float((pod.get("spec") or {}).get("terminationGracePeriodSeconds") or 30)
            longest = max(longest, own if grace_seconds is None else min(own, grace_seconds))
            if grace_seconds is not None or end_of(item) is not None:
                grace = None if grace_seconds is None else int(min(own, grace_seconds))
                path_of_pod = self.pod_path(pod["metadata"]["name"])
                self.api.delete(path_of_pod, propagation="Background", grace=grace, uid=uid_of(pod))
        until = time.monotonic() + longest + 30
        while left := self._running(name):
            if time.monotonic() > until:
                where = ", ".join(sorted({str(p["spec"].get("nodeName")) for p in left}))
                raise TryAgain(f"{name} is deleted and its pods are still there, on {where}: does the node answer?")
            time.sleep(POLL_SECONDS)

    def logs(self, name: str, *, follow: bool = False) -> Iterator[str]:
        """Lines of its log so far, and with `follow` those to come. Raises GiveUp if there is none any more."""
        pods = [p for p in self.pods_of(name) if "-worker-" not in p["metadata"]["name"]]
        if pods:
            newest = max(pods, key=lambda p: str(p["metadata"].get("creationTimestamp")))
            log = PodLog(self.api, self.pod_path(newest["metadata"]["name"]), _container(newest))
            with contextlib.suppress(ApiStatus):  # its container has not begun
                yield from log.read(follow=follow)
            return
        folder = self.local_folder(name)
        if folder is None or not (folder / "log.txt").is_file():
            raise GiveUp(f"job {name!r} has no log: it has no pod in namespace {self.settings.namespace} any more")
        yield from (folder / "log.txt").read_text(errors="replace").splitlines()

    def close(self) -> None:
        """End the watches: whoever waits in `run` gets TryAgain. What runs there goes on."""
        with self._lock:
            watches, self._watches = list(self._watches.values()), {}
        for watch in watches:
            watch.close()

    # --- what a run needs

    def object_path(self, image: Image, name: str) -> str:
        """The path of the object of a workload; with an empty name, of the collection."""
        kind = "kubeflow.org/v1" if image == "train" else "batch/v1"
        plural = "pytorchjobs" if image == "train" else "jobs"
        return f"/apis/{kind}/namespaces/{self.settings.namespace}/{plural}" + (f"/{name}" if name else "")

    def pod_path(self, name: str) -> str:
        """The path of a pod; with an empty name, of the collection."""
        return f"/api/v1/namespaces/{self.settings.namespace}/pods" + (f"/{name}" if name else "")

    def pods_of(self, name: str) -> list[Json]:
        """The pods of a workload, as they are now."""
        items = self.api.get(self.pod_path(""), labelSelector=f"{WORKLOAD_LABEL}={name}").get("items")
        return list(items or [])

    def local_folder(self, name: str) -> Path | None:
        """The workload's folder on the state volume, as this process sees it; None where it is not mounted."""
        return self.state / "jobs" / name if self.state is not None else None

    def make_folder(self, name: str) -> Path | None:
        """`local_folder`, made if need be, so that pods of the volume's group may write there too."""
        folder = self.local_folder(name)
        if folder is not None and not folder.is_dir():
            for made in (folder.parent, folder):
                made.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(PermissionError):  # somebody else's, who did the same
                    made.chmod(0o2775)
        return folder

    def node(self, name: str, *, before: Json | None = None) -> Json:
        """The node, {**before, "gone": True} if it is away, `before` or {} if it may not be read."""
        try:
            return self.api.request("GET", f"/api/v1/nodes/{name}", patience=5.0)
        except ApiStatus as status:
            return {**(before or {}), "gone": True} if status.code == 404 else before or {}
        except StepError:  # no right to read nodes: the cause is told with less detail
            return before or {}

    def events_about(self, kind: str, name: str) -> list[Json]:
        """Events about an object, best effort: they tell who evicted a pod, or why there is none."""
        namespace = "default" if kind == "Node" else self.settings.namespace
        query = {"fieldSelector": f"involvedObject.kind={kind},involvedObject.name={name}"}
        with contextlib.suppress(StepError, ApiStatus):
            answer = self.api.request("GET", f"/api/v1/namespaces/{namespace}/events", query=query, patience=5.0)
            return list(answer.get("items") or [])
        return []

    def _watch(self, path: str) -> SharedWatch:
        api = self.api
        with self._lock:
            return self._watches.setdefault(path, SharedWatch(api, path))

    def _find(self, name: str) -> tuple[str, Json | None]:
        images: tuple[Image, Image] = ("train", "step")
        for image in images:
            path = self.object_path(image, name)
            with contextlib.suppress(PreflightError):  # a cluster without PyTorchJobs has Jobs
                if (item := self.api.find(path)) is not None:
                    return path, item
        return path, None

    def _running(self, name: str) -> list[Json]:
        return [pod for pod in self.pods_of(name) if not is_terminal(pod)]


def _container(pod: Json) -> str:
    names = [str(c["name"]) for c in pod["spec"]["containers"]]
    return next((n for n in names if n in CONTAINERS.values()), names[0])
