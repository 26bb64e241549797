"""TorchServe's management and inference API over a dictionary, with its rules: for tests of the rollout that are fast.

It answers from the .mar's own files: `answers` maps a label to what that version says to each body. Faults per label:
"never ready", "crash loop", "raises", "slow", "wrong version". The real server is held to the same tests in
test_deploy_model.py.
"""

from __future__ import annotations

import json
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from deployments.serving import TorchServe
from tasks.archive import content_digest
from tests.loopback_kit import JsonHandler, serving


@dataclass
class Held:
    """A version that the stub holds."""

    mar: str
    version: str
    digest: str
    registered: float = field(default_factory=time.monotonic)
    pid: int = 1000


class Stub(ThreadingHTTPServer):
    """Both APIs on one port."""

    daemon_threads = True

    def __init__(self, store: Path):
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.model_store = store
        self.models: dict[str, dict[str, Held]] = {}
        self.defaults: dict[str, str] = {}
        self.answers: Callable[[str, bytes], dict[str, Any]] = lambda label, body: {}
        self.faults: dict[str, str] = {}
        self.load_seconds = 0.0
        self.calls: list[str] = []
        self.served: dict[str, int] = {}  # label -> unpinned answers
        self.guard = threading.Lock()

    @property
    def client(self) -> TorchServe:
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return TorchServe(url, url)


class StubHandler(JsonHandler):
    server: Stub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one write per answer: two would cost 40 ms each by Nagle's algorithm and a delayed ACK

    def handle_all(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        segments = [unquote(part) for part in parts.path.strip("/").split("/")]
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if segments[0] == "predictions":
            return self.predict(segments[1], segments[2] if len(segments) > 2 else "", body)
        with self.server.guard:
            self.server.calls.append(f"{self.command} {parts.path}")
            return self.manage(segments, query)

    do_GET = do_POST = do_PUT = do_DELETE = handle_all

    def manage(self, segments: list[str], query: dict[str, str]) -> None:
        server, model = self.server, segments[1] if len(segments) > 1 else query.get("model_name", "")
        held = server.models.get(model, {})
        if self.command == "POST":
            mar = server.model_store / query["url"]
            try:
                with zipfile.ZipFile(mar) as archive:
                    about = json.loads(archive.read("serving.json"))
            except (OSError, zipfile.BadZipFile) as error:
                return self.answer(400, {"message": f"cannot load {mar}: {error}"})
            if about["label"] in held:
                return self.answer(409, {"message": f"Model version {about['label']} is already registered"})
            server.models.setdefault(model, held)[about["label"]] = Held(
                mar=query["url"], version=about["version"], digest=content_digest(mar)
            )
            server.defaults.setdefault(model, about["label"])
            return self.answer(202, {"status": "Processing worker updates..."})
        if self.command == "GET" and len(segments) == 1:
            return self.answer(200, {"models": [{"modelName": name} for name in server.models]})
        if not held:
            return self.answer(404, {"message": f"Model not found: {model}"})
        if self.command == "GET":
            labels = list(held) if len(segments) > 2 else [server.defaults[model]]
            return self.answer(200, [self.describe(label, held[label]) for label in labels])
        label = segments[2]
        if label not in held:
            return self.answer(404, {"message": f"Model version: {label} does not exist"})
        if self.command == "PUT":
            server.defaults[model] = label
            return self.answer(200, {"status": "Default version successfully updated"})
        if server.defaults[model] == label and len(held) > 1:
            return self.answer(403, {"message": f"Cannot remove default version for model {model}"})
        del held[label]
        if not held:
            del server.models[model], server.defaults[model]
        return self.answer(200, {"status": "unregistered"})

    def describe(self, label: str, held: Held) -> dict[str, Any]:
        fault = self.server.faults.get(label)
        if fault == "crash loop":
            held.pid += 1
        loading = time.monotonic() - held.registered < self.server.load_seconds
        ready = not loading and fault not in ("never ready", "crash loop")
        worker = {"id": "9000", "status": "READY" if ready else "UNLOADING", "pid": held.pid}
        return {
            "modelVersion": label,
            "modelUrl": held.mar,
            "minWorkers": 1,
            "workers": [worker],
            "responseTimeout": 2,
            "jobQueueStatus": {"remainingCapacity": 100, "pendingRequests": 0},
        }

    def predict(self, model: str, pinned: str, body: bytes) -> None:
        server = self.server
        with server.guard:
            label = pinned or server.defaults.get(model, "")
            held = server.models.get(model, {}).get(label)
            if held and not pinned:
                server.served[label] = server.served.get(label, 0) + 1
        if held is None:
            return self.answer(404, {"message": f"Model not found: {model} {label}"})
        fault = server.faults.get(label)
        headers = {"x-model-label": label, "x-content-digest": held.digest, "x-worker": str(held.pid)}
        if fault == "slow":
            time.sleep(0.2)
        if fault == "raises":
            return self.answer(503, {"message": "Prediction failed"}, headers)
        if not body:
            return self.answer(400, {"error": "empty"}, headers)
        version = "999" if fault == "wrong version" else held.version
        return self.answer(200, {**server.answers(label, body), "model": model, "model_version": version}, headers)


@contextmanager
def torchserve_stub(store: Path) -> Iterator[Stub]:
    """The stub on a free port, with this model store."""
    stub = Stub(store)
    with serving(stub):
        yield stub
