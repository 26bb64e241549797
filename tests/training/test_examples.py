"""The examples' modules on their real data: splits, requests that are refused, learning, and how resume sees them."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flows.settings import load_pipeline
from training.examples.digits.make_data import add_data as add_digits
from training.examples.digits.make_data import make_data as make_digits
from training.examples.tumours.make_data import add_data as add_tumours
from training.examples.tumours.make_data import make_data as make_tumours

EXAMPLES = Path(__file__).resolve().parents[2] / "training" / "examples"
NAMES = ("digits", "tumours")


def module_of(name: str) -> ModuleType:
    """The example's module, imported by path as the trainer and the server do."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / name / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert make_digits(folder / "digits") == 1797
    assert make_tumours(folder / "tumours") == 569
    return folder


def train(name: str, data: Path, epochs: int | None = None) -> tuple[torch.nn.Module, float]:
    """A plain loop over the example's own settings; returns the model and its held-out accuracy."""
    torch.set_num_threads(1)
    user, settings = module_of(name), load_pipeline(EXAMPLES / name / "pipeline.toml")
    params = settings.train.params
    torch.manual_seed(settings.train.seed)
    inputs, targets = user.load_split(data / name, settings.data.train, params).tensors
    model, size = user.build_model(params), settings.train.batch_size
    epochs = epochs or settings.train.epochs
    optimizer = (
        user.build_optimizer(model, params)
        if hasattr(user, "build_optimizer")
        else torch.optim.AdamW(model.parameters(), lr=params["learning_rate"])
    )
    steps = epochs * -(-len(inputs) // size)
    scheduler = user.build_scheduler(optimizer, params, steps) if hasattr(user, "build_scheduler") else None
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs)).split(size):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    model.eval()
    inputs, targets = user.load_split(data / name, settings.data.heldout, params).tensors
    with torch.no_grad():
        accuracy = float((model(inputs).argmax(dim=1) == targets).float().mean())
    return model, accuracy


@pytest.mark.parametrize("name", NAMES)
def test_imports_nothing_of_ours(name: str) -> None:
    tree = ast.parse((EXAMPLES / name / f"{name}.py").read_text())
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported <= {"torch", "numpy", *sys.stdlib_module_names}


def test_digits_files_are_the_same_every_time_and_the_splits_are_apart(data: Path, tmp_path: Path) -> None:
    make_digits(tmp_path)
    here = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.pgm")}
    assert here == {p.relative_to(data / "digits"): p.read_bytes() for p in (data / "digits").rglob("*.pgm")}
    train_names = {p.name for p in (tmp_path / "train").rglob("*.pgm")}
    heldout = list((tmp_path / "heldout").rglob("*.pgm"))
    assert not train_names & {p.name for p in heldout}
    shares = Counter(p.parent.name for p in heldout)
    assert set(shares) == set("0123456789") and all(33 <= n <= 37 for n in shares.values())


def test_tumours_rows_are_the_same_every_time(data: Path, tmp_path: Path) -> None:
    make_tumours(tmp_path)
    for split in ("train.csv", "heldout.csv"):
        assert (tmp_path / split).read_bytes() == (data / "tumours" / split).read_bytes()
    assert len((tmp_path / "heldout.csv").read_text().splitlines()) == 114


def test_digits_learn(data: Path) -> None:
    assert train("digits", data)[1] >= 0.97


def test_tumours_learn(data: Path) -> None:
    model, accuracy = train("tumours", data)
    assert accuracy >= 0.95
    user = module_of("tumours")
    inputs, targets = user.load_split(data / "tumours", "heldout.csv", {}).tensors
    with torch.no_grad():
        found = user.metrics(model(inputs), targets)
    assert found["accuracy"] == pytest.approx(accuracy) and 0.9 <= found["recall"] <= 1.0


def test_digits_depend_on_torch_s_generator_while_training_only(data: Path) -> None:
    user = module_of("digits")
    model, batch = user.build_model({}), user.load_split(data / "digits", "heldout", {}).tensors[0][:4]
    torch.manual_seed(1)
    first = model(batch)
    assert not torch.equal(first, model(batch)), "no chance in it: a lost generator would go unnoticed"
    torch.manual_seed(1)
    assert torch.equal(first, model(batch))
    model.eval()
    assert torch.equal(model(batch), model(batch))


def test_shift_moves_whole_images_by_at_most_its_reach() -> None:
    shift = module_of("digits").RandomShift(1)
    image = torch.zeros(200, 1, 8, 8)
    image[:, 0, 4, 4] = 1.0
    moved = shift(image)
    assert moved.shape == image.shape and torch.equal(moved.sum(dim=(1, 2, 3)), torch.ones(200))
    places = {(int(r), int(c)) for _, _, r, c in moved.nonzero()}
    assert places == {(r, c) for r in (3, 4, 5) for c in (3, 4, 5)}


@pytest.mark.parametrize("name", NAMES)
def test_a_request_gives_the_sample_s_own_input(name: str, data: Path) -> None:
    user, settings = module_of(name), load_pipeline(EXAMPLES / name / "pipeline.toml")
    split = user.load_split(data / name, settings.data.heldout, {})
    requests = list(user.heldout_requests(data / name, settings.data.heldout, {}))
    assert len(requests) == len(split) and len({r[0] for r in requests}) == len(requests)
    for number in (0, len(requests) // 2, -1):
        _, body, label = requests[number]
        given, target = split[number]
        assert torch.equal(user.preprocess(body), given)
        assert (user.LABELS[int(target)] if name == "tumours" else int(target)) == label


@pytest.mark.parametrize(
    ("name", "body", "expected"),
    [
        ("digits", b"", "binary PGM"),
        ("digits", b"P2\n8 8\n16\n", "binary PGM"),
        ("digits", b"P5\n9 8\n16\n" + bytes(72), "8 x 8 pixels, got 9 x 8"),
        ("digits", b"P5\n8 8\n16\n" + bytes(63), "64 bytes of pixels, got 63"),
        ("digits", b"P5\n8 8\n0\n" + bytes(64), "largest value"),
        ("digits", b"P5\n8 8\n16\n" + b"\x11" * 64, "at most 16, got 17"),
        ("tumours", b"1,2,3", "30 numbers, got 3"),
        ("tumours", b"x," * 29 + b"x", "number in place 1, got 'x'"),
        ("tumours", b"nan," * 29 + b"1", "finite number in place 1"),
        ("tumours", b"[1, 2", "JSON list"),
        ("tumours", b'[null, "a"]', "30 numbers, got 2"),
        ("tumours", b"\xff\xfe", "CSV row or a JSON list"),
    ],
)
def test_bad_request_says_what_was_expected(name: str, body: bytes, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        module_of(name).preprocess(body)


def test_pgm_of_another_program_is_read() -> None:
    user = module_of("digits")
    pixels = bytes(range(64))
    plain = user.preprocess(b"P5\n8 8\n255\n" + pixels)
    assert torch.equal(plain, user.preprocess(b"P5 # by hand\n8\n# size\n8 255\n" + pixels))
    assert float(plain.max()) == pytest.approx(63 / 255)


def test_a_csv_row_and_a_json_list_are_the_same_request(data: Path) -> None:
    user = module_of("tumours")
    _, body, _ = next(user.heldout_requests(data / "tumours", "heldout.csv", {}))
    as_json = json.dumps([float(v) for v in body.split(b",")]).encode()
    assert torch.equal(user.preprocess(body), user.preprocess(as_json))


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_json_with_a_label(name: str) -> None:
    output: Any = torch.tensor([0.1, 2.0] + [0.0] * 8) if name == "digits" else torch.tensor([0.1, 2.0])
    answer = json.loads(json.dumps(module_of(name).postprocess(output)))
    assert answer["label"] == (1 if name == "digits" else "benign")
    assert sum(answer["scores"]) == pytest.approx(1, abs=1e-4) if name == "digits" else answer["probability"] > 0.8


def test_empty_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected images"):
        module_of("digits").load_split(tmp_path, "train", {})
    (tmp_path / "train.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="no rows"):
        module_of("tumours").load_split(tmp_path, "train.csv", {})


def test_more_data_touches_training_only(tmp_path: Path) -> None:
    make_digits(tmp_path / "d")
    make_tumours(tmp_path / "t")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert (add_digits(tmp_path / "d", 1), add_digits(tmp_path / "d", 2), add_tumours(tmp_path / "t", 1)) == (
        100,
        100,
        40,
    )
    new = [p for p in tmp_path.rglob("*") if p.is_file() and p not in before]
    assert len(new) == 200 and all(p.parent.parent.name == "train" for p in new)
    assert [p.name for p, old in before.items() if p.read_bytes() != old] == ["train.csv"]
    user = module_of("digits")
    assert len(user.load_split(tmp_path / "d", "train", {})) == 1442 + 200
