"""A cluster for tests of the rolling update that are fast: kube_fake, a Deployment controller and a Service of pods.

The controller plays what the real one does with maxUnavailable 0 and maxSurge 1: pods of a new template count only when
they are ready, and the old ones answer until then. The Service answers as the handler does, from `answers`. Faults per
label or image: "crash loop", "wrong" (the pod's own proof says so), "wrong numbers" (only the Service's answers are),
"image", "no node", "never ready", "slow". The real parts are held to the same in tests/test_cluster_serving.py.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any

from deployments.cluster_serving import REVISION
from deployments.serving_manifests import LABEL_ANNOTATION, VERSION_ANNOTATION
from tests.deployments.kube_fake import KubeFake
from tests.deployments.kube_store import PODS, timestamp
from tests.loopback_kit import JsonHandler

Json = dict[str, Any]
DEPLOYMENTS, SETS = "/apis/apps/v1/namespaces/ns/deployments", "/apis/apps/v1/namespaces/ns/replicasets"
SERVICES, BUDGETS = "/api/v1/namespaces/ns/services", "/apis/policy/v1/namespaces/ns/poddisruptionbudgets"
NAME = "serve-toy"
STEP = 0.02  # seconds


class PodCluster:
    """The Deployment serve-toy, played; one of it at a time."""

    def __init__(self, kube: KubeFake) -> None:
        self.kube = kube
        self.faults: dict[str, str] = {}
        self.answers: Callable[[str, bytes], Json] = lambda label, body: {}
        self.digests: dict[str, str] = {}  # label -> content digest
        self.ready: list[tuple[str, str]] = []  # (label, version) of the pods that the Service sends to
        self.running = ""  # their template
        self.answered: list[str] = []  # labels, in the order of the answers
        self.templates: list[str] = []  # labels in the order in which their pods were started
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._control, daemon=True)
        self._service = Service(self)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._service.server_address[1]}"

    def labels(self) -> list[str]:
        return sorted({label for label, _ in self.ready})

    # --- the controller

    def _control(self) -> None:
        seen, revision, current, uid = -1, 0, "", ""
        while not self._stop.wait(STEP):
            with self.kube.lock:
                if not self.kube.has(DEPLOYMENTS, NAME):
                    seen, revision, current, self.ready, self.running = -1, 0, "", [], ""
                    for collection in (SETS, PODS):
                        for name in list(self.kube.objects.get(collection, {})):
                            self.kube.remove(collection, name)
                    continue
                item = self.kube.get(DEPLOYMENTS, NAME)
                if item["metadata"]["uid"] != uid:  # made anew since the last look
                    seen, revision, current, self.ready, self.running = -1, 0, "", [], ""
                    uid = item["metadata"]["uid"]
                template = item["spec"]["template"]
                text = json.dumps(template, sort_keys=True)
                if text != current:
                    revision, current = revision + 1, text
                    item["metadata"].setdefault("annotations", {})[REVISION] = str(revision)
                    self._start(item, revision)
                elif item["metadata"]["generation"] == seen:
                    continue
                seen = item["metadata"]["generation"]
                item.setdefault("status", {})["observedGeneration"] = seen
                self._settle(item, revision)
                self.kube.put(DEPLOYMENTS, item)

    def _start(self, item: Json, revision: int) -> None:
        for name in list(self.kube.objects.get(PODS, {})):
            self.kube.remove(PODS, name)
        label = item["spec"]["template"]["metadata"]["annotations"][LABEL_ANNOTATION]
        self.templates.append(label)
        labels = item["spec"]["selector"]["matchLabels"]
        owner = {"uid": item["metadata"]["uid"]}
        about = {"labels": labels, "annotations": {REVISION: str(revision)}, "ownerReferences": [owner]}
        self.kube.put(SETS, {"metadata": {"name": f"{NAME}-{revision}", "uid": f"r{revision}", **about}, "spec": {}})

    def _settle(self, item: Json, revision: int) -> None:
        """Straight to where the rollout would come to rest."""
        annotations = item["spec"]["template"]["metadata"]["annotations"]
        label, version = annotations[LABEL_ANNOTATION], annotations[VERSION_ANNOTATION]
        image = item["spec"]["template"]["spec"]["containers"][0]["image"]
        count, fault = item["spec"].get("replicas", 1), self.faults.get(image) or self.faults.get(label, "")
        status = item["status"]
        status.pop("conditions", None)
        pods = json.dumps(item["spec"]["template"], sort_keys=True)
        if fault in ("", "wrong numbers", "slow") or pods == self.running:
            self.ready, self.running = [(label, version)] * count, pods
            status |= {"replicas": count, "updatedReplicas": count, "availableReplicas": count}
            return
        status |= {"replicas": len(self.ready) + 1, "updatedReplicas": 1, "availableReplicas": len(self.ready)}
        pod: Json = {"phase": "Running"}
        main = {"name": "torchserve", "image": image, "ready": False, "restartCount": 0}
        if fault == "crash loop":
            pod["containerStatuses"] = [
                {**main, "restartCount": 2, "lastState": {"terminated": {"exitCode": 1, "message": "boom\n"}}}
            ]
        elif fault == "wrong":
            ended = {"terminated": {"exitCode": 4, "message": "the model answers wrongly: s1\n"}}
            pod["containerStatuses"] = [{**main, "state": ended}]
        elif fault == "image":
            waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "manifest unknown"}}
            pod = {"phase": "Pending", "containerStatuses": [{**main, "state": waiting}]}
        elif fault == "no node":
            message = "0/3 nodes are available: 3 Insufficient memory."
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
            pod = {"phase": "Pending", "conditions": [condition]}
            status["conditions"] = [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}]
        metadata = {"name": f"{NAME}-{revision}-x", "labels": item["spec"]["selector"]["matchLabels"]}
        metadata["ownerReferences"] = [{"uid": f"r{revision}"}]
        self.kube.put(PODS, {"metadata": metadata, "spec": {}, "status": {"startTime": timestamp(), **pod}})

    def __enter__(self) -> PodCluster:
        self._thread.start()
        threading.Thread(target=self._service.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._service.shutdown()
        self._service.server_close()


class Service(ThreadingHTTPServer):
    """Sends each request to one of the ready pods."""

    daemon_threads = True

    def __init__(self, pods: PodCluster) -> None:
        super().__init__(("127.0.0.1", 0), ServiceHandler)
        self.pods = pods


class ServiceHandler(JsonHandler):
    server: Service
    wbufsize = -1

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pods = self.server.pods
        ready = list(pods.ready)
        if not ready:
            self.close_connection = True
            return
        label, version = ready[len(pods.answered) % len(ready)]
        pinned = self.path.split("/")[3:] or [label]
        pods.answered.append(label)
        if pods.faults.get(label) == "slow":
            time.sleep(0.2)
        if pinned != [label]:
            return self.reply(404, {"message": f"Model version {pinned[0]} not found"}, "")
        if not body:
            return self.reply(400, {"error": "empty"}, label)
        answer = dict(pods.answers(label, body))
        if pods.faults.get(label) == "wrong numbers":
            answer["probabilities"] = [0.5 for _ in answer["probabilities"]]
        return self.reply(200, {**answer, "model": "toy", "model_version": version}, label)

    def reply(self, status: int, document: Json, label: str) -> None:
        told = {"x-model-label": label, "x-content-digest": self.server.pods.digests.get(label, "")}
        self.answer(status, document, told if label else None)


@contextmanager
def pod_cluster() -> Iterator[PodCluster]:
    """A fake API with its controller and Service."""
    with KubeFake() as kube, PodCluster(kube) as pods:
        yield pods
