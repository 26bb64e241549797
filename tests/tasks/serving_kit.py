"""What the tests of packaging and serving share: a small model with its held-out answers, a TorchServe, an MLflow stub.

The stub keeps aliases as MLflow 3.17 answers them; test_champion.py holds it against the real server.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from deployments.serving import TorchServe
from deployments.torchserve_launch import (
    TorchServePorts,
    private_tmp,
    stop_signal_pid,
    stop_torchserve,
    torchserve_command,
)
from tasks.deploy_model import DeployRequest
from tasks.golden import read_golden
from tasks.package_model import PackagedModel, PackageRequest, package_model
from tests.loopback_kit import JsonHandler, serving

MODULE = """
import json
import torch

def build_model(params):
    return torch.nn.Linear(4, 3)

def preprocess(body):
    values = json.loads(body)["values"]
    if len(values) != 4:
        raise ValueError(f"values: expected 4 numbers, got {len(values)}")
    return torch.tensor(values, dtype=torch.float32)

def postprocess(output):
    shares = torch.softmax(output, 0)
    return {"label": int(shares.argmax()), "probabilities": [float(s) for s in shares]}
"""


@dataclass(frozen=True, kw_only=True)
class Toy:
    """One trained toy: its folder has toy.py, model.safetensors and heldout.jsonl."""

    folder: Path
    sha256: str

    @property
    def heldout(self) -> Path:
        return self.folder / "heldout.jsonl"


def make_toy(folder: Path, seed: int = 0, samples: int = 40, module: str = MODULE, flipped: bool = False) -> Toy:
    """A linear model and its own answers. `flipped`: weights that answer other classes than heldout.jsonl says."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.py").write_text(module)
    names: dict[str, Any] = {}
    exec(compile(MODULE, "toy", "exec"), names)
    torch.manual_seed(seed)
    model = names["build_model"]({})
    inputs = torch.randn(samples, 4, generator=torch.Generator().manual_seed(7))
    lines = []
    with torch.inference_mode():
        for number, row in enumerate(inputs):
            answer = names["postprocess"](model(row[None])[0])
            body = json.dumps({"values": row.tolist()}).encode()
            line = {"name": f"sample-{number:03}", "body_b64": base64.b64encode(body).decode()}
            lines.append(json.dumps(line | {"label": answer["label"], "answer": answer}))
    (folder / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    state = model.state_dict()
    if flipped:
        state = {name: tensor.roll(1, 0).contiguous() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors")
    return Toy(folder=folder, sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())


def package_request(toy: Toy, store: Path, version: int = 1, **more: Any) -> PackageRequest:
    """The request that packages a toy; the key depends on everything given."""
    serve = {"batch_size": 8, "max_batch_delay_seconds": 0.005, "workers": 1, "response_timeout_seconds": 10}
    given = {
        "pipeline": "toy",
        "version": str(version),
        "weights": str(toy.folder / "model.safetensors"),
        "weights_sha256": toy.sha256,
        "module": str(toy.folder / "toy.py"),
        "serve": serve | more.pop("serve", {}),
        "model_store": str(store),
    } | more
    key = hashlib.sha256(json.dumps([given, MODULE], sort_keys=True, default=str).encode()).hexdigest()[:40]
    return PackageRequest(**{"key": key, **given})


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A running TorchServe."""

    server: TorchServe
    store: Path
    process: subprocess.Popen[bytes]
    state: Path

    def jvm(self) -> int:
        found = stop_signal_pid(self.process.pid)
        assert found, "the server is gone"
        return found


@contextmanager
def torchserve(folder: Path, first_port: int, models: dict[str, str] | None = None) -> Iterator[Serving]:
    """TorchServe on `first_port` and the four after it, its store in `folder`; ended with everything it started."""
    one, two, three, four, five = range(first_port, first_port + 5)
    ports = TorchServePorts(inference=one, management=two, metrics=three, grpc_inference=four, grpc_management=five)
    launch = torchserve_command(folder / "state", folder / "models", ports, models=models)
    with (folder / "state" / "console.log").open("wb") as log:
        process = subprocess.Popen(
            launch.argv, env=launch.env, cwd=launch.cwd, stdout=log, stderr=log, start_new_session=True
        )
    server = TorchServe(f"http://127.0.0.1:{two}", f"http://127.0.0.1:{one}")
    try:
        server.wait_until_up(60)
        yield Serving(server=server, store=folder / "models", process=process, state=folder / "state")
    finally:
        stop_torchserve(process)
        shutil.rmtree(private_tmp(folder / "state"), ignore_errors=True)


class Registry(ThreadingHTTPServer):
    """MLflow's alias API over a dictionary. `fail` makes the next N requests answer 503."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RegistryHandler)
        self.aliases: dict[tuple[str, str], str] = {}
        self.fail = 0
        self.moves: list[str | None] = []

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class RegistryHandler(JsonHandler):
    server: Registry

    def do_GET(self) -> None:
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        found = self.server.aliases.get((query["name"], query["alias"]))
        if found is None:
            text = f"Registered model alias {query['alias']} not found."
            return self.answer(400, {"error_code": "INVALID_PARAMETER_VALUE", "message": text})
        return self.answer(200, {"model_version": {"name": query["name"], "version": found}})

    def do_POST(self) -> None:
        row = self.body()
        if self.server.fail:
            self.server.fail -= 1
            return self.answer(503, {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "asked to fail"})
        self.server.aliases[row["name"], row["alias"]] = row["version"]
        self.server.moves.append(row["version"])
        return self.answer(200, {})

    def do_DELETE(self) -> None:
        row = self.body()
        self.server.aliases.pop((row["name"], row["alias"]), None)
        self.server.moves.append(None)
        return self.answer(200, {})


@contextmanager
def registry() -> Iterator[Registry]:
    """The stub, on a free port."""
    stub = Registry()
    with serving(stub):
        yield stub


def package(toy: Toy, store: Path, version: int = 1, **more: Any) -> tuple[PackageRequest, PackagedModel]:
    """Package a toy."""
    request = package_request(toy, store, version, **more)
    return request, package_model(request)


def three_versions(folder: Path, *, bad: int = 0) -> dict[str, Any]:
    """By MLflow version: request of the packaging, what came of it, held-out answers.

    The version `bad` answers as its torch model does, and the first one's answers are the truth.
    """
    parts: dict[str, Any] = {}
    for version in (1, 2, 3):
        toy = make_toy(folder / f"toy{version}", seed=version)
        if version == bad:
            rows = [json.loads(line) for line in toy.heldout.read_text().splitlines()]
            truth = [sample.answer["label"] for sample in read_golden(parts["1"][2])]
            lines = [json.dumps(row | {"label": label}) for row, label in zip(rows, truth, strict=True)]
            toy.heldout.write_text("\n".join(lines))
        parts[str(version)] = (*package(toy, folder / "models", version), toy.heldout)
    return parts


def deploy_request(
    request: PackageRequest,
    packaged: PackagedModel,
    heldout: Path,
    server: TorchServe,
    uri: str,
    record: Path,
    **more: Any,
) -> DeployRequest:
    """The request that deploys what was packaged."""
    given: dict[str, Any] = {
        "key": request.key,
        "pipeline": request.pipeline,
        "version": request.version,
        "label": packaged.label,
        "mar": packaged.mar,
        "sha256": packaged.sha256,
        "management_url": server.management_url,
        "inference_url": server.inference_url,
        "serve": request.serve,
        "golden": str(heldout),
        "soak_seconds": 0.3,
        "tracking_uri": uri,
        "record": str(record),
    }
    return DeployRequest(**(given | more))


def wait_for(condition: Any, seconds: float) -> None:
    """Wait until `condition()` is true; fails the test if it never is."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.05)
