"""The handler as TorchServe's worker calls it: one forward per batch, and one bad request costs only itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deployments.torchserve import handler as source
from tasks.archive import content_digest as mar_digest
from tests.tasks.serving_kit import make_toy, package

MODULE = """
import json
import torch

class Counting(torch.nn.Linear):
    calls = []
    def forward(self, x):
        Counting.calls.append(len(x))
        return super().forward(x)

def build_model(params):
    return Counting(params["width"], 3)

def preprocess(body):
    return torch.tensor(json.loads(body)["values"], dtype=torch.float32)

def postprocess(output):
    return {"label": int(output.argmax()), "scores": output.tolist()}
"""


class Context(SimpleNamespace):
    """What the handler uses of TorchServe's context."""

    def __init__(self, folder: Path):
        super().__init__(system_properties={"model_dir": str(folder), "gpu_id": None}, statuses={}, headers={})

    def set_response_status(self, code: int, phrase: str, idx: int) -> None:
        assert phrase.isascii()
        self.statuses[idx] = code

    def set_response_content_type(self, idx: int, value: str) -> None:
        self.headers.setdefault(idx, {})["content-type"] = value

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        self.headers.setdefault(idx, {})[key] = value


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "counting.py").write_text(MODULE)
    about = {
        "label": "3.ab",
        "model": "toy",
        "version": "3",
        "module": "counting.py",
        "params": {"width": 4},
        "serve": {},
    }
    (folder / "serving.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    save_file(torch.nn.Linear(4, 3).state_dict(), folder / "model.safetensors")
    threads = torch.get_num_threads()
    yield Context(folder)
    torch.set_num_threads(threads)


@pytest.fixture
def loaded(context: Context) -> source.Handler:
    made = source.Handler()
    made.initialize(context)
    made.module.Counting.calls.clear()
    return made


def rows(*values: Any) -> list[dict[str, Any]]:
    return [{"body": json.dumps({"values": value}).encode()} for value in values]


def ask(handler: source.Handler, context: Context, data: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Status and document per request."""
    context.statuses.clear()
    bodies = handler.handle(data, context)
    assert len(bodies) == len(data)
    return [(context.statuses.get(n, 200), json.loads(body)) for n, body in enumerate(bodies)]


def test_a_batch_is_one_forward_and_every_answer_names_its_version(loaded: source.Handler, context: Context) -> None:
    inputs = torch.randn(32, 4).tolist()
    together = ask(loaded, context, rows(*inputs))
    assert loaded.module.Counting.calls == [32]
    alone = [ask(loaded, context, rows(value))[0] for value in inputs]
    for (status, answer), (_, single) in zip(together, alone, strict=True):
        assert status == 200 and answer["model"] == "toy" and answer["model_version"] == "3"
        assert answer["label"] == single["label"]
        assert answer["scores"] == pytest.approx(single["scores"], abs=1e-5)
    assert context.headers[0]["x-model-label"] == "3.ab"
    assert context.headers[0]["x-worker"] == str(os.getpid())
    assert context.headers[0]["content-type"] == "application/json"


def test_bad_requests_cost_only_themselves(loaded: source.Handler, context: Context) -> None:
    good = [1.0, 2.0, 3.0, 4.0]
    assert ask(loaded, context, rows(good))[0][0] == 200  # from now on the handler knows a shape that works
    loaded.module.Counting.calls.clear()
    data = rows(good, [1.0, 2.0], [float("nan")] * 4, good)
    data[1:1] = [{"body": b"nonsense"}, {"body": b""}, {}]
    answers = ask(loaded, context, data)
    assert [status for status, _ in answers] == [200, 400, 400, 400, 400, 400, 200]
    assert "this model takes [[4]]" in answers[4][1]["error"]
    assert "JSON" in answers[1][1]["error"] and answers[1][1]["model_version"] == "3"
    assert loaded.module.Counting.calls == [3, 1]  # one for the right shape, one for the wrong


def test_a_model_that_raises_is_the_models_fault(loaded: source.Handler, context: Context) -> None:
    loaded.model.forward = None
    status, answer = ask(loaded, context, rows([1.0, 2.0, 3.0, 4.0]))[0]
    assert status == 500 and "TypeError" in answer["error"]


def test_nan_from_a_finite_input_is_the_models_fault(loaded: source.Handler, context: Context) -> None:
    with torch.no_grad():
        loaded.model.bias.fill_(float("nan"))
    assert ask(loaded, context, rows([1.0, 2.0, 3.0, 4.0]))[0][0] == 500


def test_rows_lost_by_the_model_are_not_given_to_the_wrong_request(loaded: source.Handler, context: Context) -> None:
    loaded.model = lambda batch: batch[:1]
    answers = ask(loaded, context, rows([1.0] * 4, [2.0] * 4))
    assert [status for status, _ in answers] == [500, 500] and "answered 1 rows to 2 inputs" in answers[0][1]["error"]


def test_a_server_that_decodes_bodies_itself(loaded: source.Handler, context: Context) -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    ways: list[dict[str, Any]] = [
        {"body": {"values": values}},
        {"body": json.dumps({"values": values})},
        {"body": bytearray(json.dumps({"values": values}).encode())},
        {"data": json.dumps({"values": values}).encode()},
    ]
    assert [status for status, _ in ask(loaded, context, ways)] == [200] * 4


def test_weights_that_do_not_fit_end_the_worker(context: Context) -> None:
    folder = Path(context.system_properties["model_dir"])
    save_file(torch.nn.Linear(5, 3).state_dict(), folder / "model.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch"):
        source.Handler().initialize(context)


def test_half_precision_answers_in_full(context: Context) -> None:
    folder = Path(context.system_properties["model_dir"])
    about = json.loads((folder / "serving.json").read_text())
    (folder / "serving.json").write_text(json.dumps(about | {"serve": {"precision": "bfloat16"}}))
    made = source.Handler()
    made.initialize(context)
    assert next(made.model.parameters()).dtype == torch.bfloat16
    assert ask(made, context, rows([1.0, 2.0, 3.0, 4.0]))[0][0] == 200


def test_the_digest_of_loaded_files_is_the_archives(tmp_path: Path) -> None:
    """What the worker reports of its folder equals what the .mar holds; one changed byte shows."""
    _, packaged = package(make_toy(tmp_path / "toy"), tmp_path / "models")
    folder = tmp_path / "unpacked"
    shutil.unpack_archive(packaged.mar, folder, "zip")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "toy.pyc").write_bytes(b"made by the worker")
    assert source.content_digest(folder) == mar_digest(Path(packaged.mar))
    (folder / "toy.py").write_text("x")
    assert source.content_digest(folder) != mar_digest(Path(packaged.mar))
