"""The one handler of every model: the user's module, found by its flat name in the .mar, behind TorchServe.

It runs inside TorchServe's worker, where nothing of Reprise is installed: standard library, torch and safetensors only.
`tasks.package_model` puts it into the .mar beside the user's module, `model.safetensors` and `serving.json`.
A batch costs one forward pass. A bad request is answered with 400 alone; its neighbours in the batch do not notice.
Every answer is `postprocess(output)` plus `model` and `model_version`, with the headers `x-model-label`,
`x-content-digest` (of the files the worker really loaded), `x-worker` (its process id: how a drain knows that this
worker has finished everything older) and `x-batch-size`.
Not covered: streaming answers, stateful sequences, models larger than one device.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def content_digest(folder: Path) -> str:
    """One digest over names and bytes of a folder's files; equals `tasks.archive.content_digest` of the .mar."""
    digests = {}
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            with path.open("rb") as handle:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(handle, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def load_module(path: Path) -> ModuleType:
    """Import the user's file under its flat name, so that a name also used by an installed package cannot win."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


class Handler:
    """TorchServe finds this class by being the only one here, and calls `initialize` once, `handle` per batch."""

    def initialize(self, context: Any) -> None:
        """Load module and weights. Anything raised here ends the worker: it never gets READY."""
        folder = Path(context.system_properties["model_dir"])
        self.about: dict[str, Any] = json.loads((folder / "serving.json").read_text())
        self.digest = content_digest(folder)
        serve = self.about["serve"]
        torch.set_num_threads(int(serve.get("threads", 1)))
        gpu = context.system_properties.get("gpu_id")
        self.device = (
            torch.device("cuda", int(gpu)) if gpu is not None and torch.cuda.is_available() else torch.device("cpu")
        )
        self.dtype = DTYPES[serve.get("precision", "float32")]
        self.module = load_module(folder / self.about["module"])
        model = self.module.build_model(self.about["params"])
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        self.model = model.to(device=self.device, dtype=self.dtype).eval()
        self.known: set[tuple[int, ...]] = set()  # input shapes that this model has answered

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer a batch, one JSON document per request, in order."""
        answers: list[tuple[int, dict[str, Any]]] = [(500, {"error": "not answered"})] * len(data)
        groups: dict[tuple[tuple[int, ...], torch.dtype], list[tuple[int, torch.Tensor]]] = {}
        for index, row in enumerate(data):
            try:
                tensor = self.module.preprocess(body_of(row))
            except Exception as error:  # whatever the user's code raises at a body, that body is the cause
                answers[index] = (400, {"error": f"{type(error).__name__}: {error}"[:500]})
            else:
                groups.setdefault((tuple(tensor.shape), tensor.dtype), []).append((index, tensor))
        for (shape, _), members in groups.items():  # one group, so one forward, unless shapes differ
            try:
                outputs = self.forward(torch.stack([tensor for _, tensor in members]))
            except Exception as error:
                known = self.known and shape not in self.known
                text = f"{type(error).__name__}: {error}"[:500]
                if known:
                    text = f"an input of shape {list(shape)}; this model takes {[list(s) for s in sorted(self.known)]}"
                for index, _ in members:
                    answers[index] = (400 if known else 500, {"error": text})
                continue
            self.known.add(shape)
            for row_number, (index, tensor) in enumerate(members):
                answers[index] = self.answer(outputs[row_number], tensor)
        return [self.encode(index, len(data), *answer, context) for index, answer in enumerate(answers)]

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """One forward pass; outputs are back on the CPU in float32, so that answers do not depend on the device."""
        if batch.is_floating_point():
            batch = batch.to(self.dtype)
        with torch.inference_mode():
            output: torch.Tensor = self.model(batch.to(self.device))
        if len(output) != len(batch):
            raise ValueError(f"the model answered {len(output)} rows to {len(batch)} inputs")
        return output.float().cpu() if output.is_floating_point() else output.cpu()

    def answer(self, output: torch.Tensor, given: torch.Tensor) -> tuple[int, dict[str, Any]]:
        """Status and answer of one request. NaN in is the caller's fault (400), NaN out alone is the model's (500)."""
        try:
            answer = dict(self.module.postprocess(output))
            json.dumps(answer, allow_nan=False)
        except Exception as error:
            finite = not given.is_floating_point() or bool(torch.isfinite(given).all())
            return (500 if finite else 400), {"error": f"{type(error).__name__}: {error}"[:500]}
        return 200, answer

    def encode(self, index: int, size: int, status: int, answer: dict[str, Any], context: Any) -> bytes:
        """Set status and headers of one request (ASCII only: TorchServe counts characters as bytes); its body."""
        if status != 200:
            context.set_response_status(
                code=status, phrase="Bad Request" if status == 400 else "Model Error", idx=index
            )
        context.set_response_content_type(index, "application/json")
        for name, value in (
            ("x-model-label", self.about["label"]),
            ("x-content-digest", self.digest),
            ("x-worker", str(os.getpid())),
            ("x-batch-size", str(size)),
        ):
            context.set_response_header(index, name, value)
        document = {**answer, "model": self.about["model"], "model_version": self.about["version"]}
        return json.dumps(document, allow_nan=False).encode()


def body_of(row: dict[str, Any]) -> bytes:
    """The raw body of a request, or its multipart field `data`. A server that decodes JSON itself is undone."""
    value = row.get("body", row.get("data", b""))
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    return value.encode() if isinstance(value, str) else json.dumps(value).encode()
