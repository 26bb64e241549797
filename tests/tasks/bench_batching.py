"""What batching gives: throughput at each batch size against batch 1, through TorchServe, for models of several kinds.

    python tests/tasks/bench_batching.py cnn mlp encoder --clients 64            on a CPU
    python tests/tasks/bench_batching.py encoder12 --clients 128 --processes 4   on a GPU, half precision

Each setting runs alone on a scratch server; the model alone, without a server, is measured beside it. Prints one JSON
line per model; `--out` keeps the curves. Bodies are raw bytes, so that no JSON is measured.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tasks.package_model import PackageRequest, package_model
from tasks.tune_serving import TuneRequest, tune_serving

COMMON = """
import torch
from torch import nn

def postprocess(output):
    label = int(output.argmax())
    return {"label": label, "score": float(output[label])}
"""
FLOATS = """
SHAPE = %s
SIZE = 1
for n in SHAPE:
    SIZE *= n

def preprocess(body):
    if len(body) != 4 * SIZE:
        raise ValueError(f"expected {4 * SIZE} bytes")
    return torch.frombuffer(bytearray(body), dtype=torch.float32).reshape(SHAPE)

def sample():
    return torch.randn(SHAPE)
"""
TOKENS = """
LENGTH = %d

def preprocess(body):
    if len(body) != 2 * LENGTH:
        raise ValueError(f"expected {2 * LENGTH} bytes")
    return torch.frombuffer(bytearray(body), dtype=torch.int16).long()

def sample():
    return torch.randint(0, 1000, (LENGTH,), dtype=torch.int16)

class Encoder(nn.Module):
    def __init__(self, layers, width, heads):
        super().__init__()
        self.embed = nn.Embedding(1000, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens)).mean(1))

def build_model(params):
    return Encoder(params["layers"], params["width"], params["heads"])
"""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn": (
        FLOATS % "(1, 16, 16)"
        + """
def build_model(params):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 40), nn.ReLU(), nn.Linear(40, 10),
    )
""",
        {},
    ),
    "mlp": (
        FLOATS % "(784,)"
        + """
def build_model(params):
    return nn.Sequential(nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 1024),
                         nn.ReLU(), nn.Linear(1024, 10))
""",
        {},
    ),
    "encoder": (TOKENS % 64, {"layers": 4, "width": 256, "heads": 4}),
    "encoder12": (TOKENS % 128, {"layers": 12, "width": 768, "heads": 12}),
}


def prepare(name: str, folder: Path, precision: str) -> tuple[str, str, dict[str, Any]]:
    """Module, weights and held-out answers of one model in `folder`: (.mar, held-out file, the model alone)."""
    import torch
    from safetensors.torch import save_file

    text, params = MODELS[name]
    (folder / f"{name}_net.py").write_text(COMMON + text)
    names: dict[str, Any] = {}
    exec(compile(COMMON + text, name, "exec"), names)
    torch.manual_seed(0)
    model = names["build_model"](params).eval()
    save_file(model.state_dict(), folder / "model.safetensors")
    parameters = sum(p.numel() for p in model.parameters())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, precision)
    model = model.to(device, dtype)
    lines = []
    with torch.inference_mode():
        for number in range(64):
            body = names["sample"]().numpy().tobytes()
            given = names["preprocess"](body)[None].to(device)
            answer = names["postprocess"](
                model(given.to(dtype) if given.is_floating_point() else given)[0].float().cpu()
            )
            row = {"name": f"s{number}", "body_b64": base64.b64encode(body).decode(), "label": None, "answer": answer}
            lines.append(json.dumps(row))
    (folder / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    packaged = package_model(
        PackageRequest(
            key=hashlib.sha256(name.encode()).hexdigest()[:40],
            pipeline=name,
            version="1",
            weights=str(folder / "model.safetensors"),
            weights_sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
            module=str(folder / f"{name}_net.py"),
            params=params,
            serve={"precision": precision, "queue": 1000},
            model_store=str(folder / "models"),
        )
    )
    alone = {f"batch {size}": rate(model, names, size, device, dtype) for size in (1, 8, 32)}
    return packaged.mar, str(folder / "heldout.jsonl"), {"parameters": parameters, "alone_per_second": alone}


def rate(model: Any, names: dict[str, Any], size: int, device: str, dtype: Any) -> float:
    """Samples per second of the model without a server."""
    import torch

    batch = torch.stack([names["preprocess"](names["sample"]().numpy().tobytes()) for _ in range(size)]).to(device)
    batch = batch.to(dtype) if batch.is_floating_point() else batch
    with torch.inference_mode():
        for _ in range(5):
            model(batch)
        done, began = 0, time.monotonic()
        while time.monotonic() - began < 1.0:
            model(batch).cpu()
            done += size
    return round(done / (time.monotonic() - began), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--delays", type=int, nargs="+", default=[5])
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    for name in given.models:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            mar, heldout, about = prepare(name, Path(folder), given.precision)
            tuned = tune_serving(
                TuneRequest(
                    pipeline=name, mar=mar, heldout=heldout, out=str(Path(given.out or folder) / name),
                    concurrency=given.clients, client_processes=given.processes, seconds=given.seconds,
                    batch_sizes=given.sizes, delays_ms=given.delays, workers=given.workers, max_p95_seconds=10.0,
                    tolerance=0.05,
                )
            )  # fmt: skip
        points = [{**asdict(p.setting), **{k: v for k, v in asdict(p).items() if k != "setting"}} for p in tuned.points]
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        line = {"model": name, "device": device, "precision": given.precision, "clients": given.clients, **about}
        print(json.dumps(line | {"best": asdict(tuned.best), "times_batch_one": tuned.times_batch_one}), flush=True)
        for point in points:
            print("  " + json.dumps(point), flush=True)


if __name__ == "__main__":
    main()
