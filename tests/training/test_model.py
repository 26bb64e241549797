"""The user's module: what is accepted, what is refused, and how it is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.model import BadModule, load_module

GOOD = """
import torch
def build_model(params): return torch.nn.Linear(2, 2)
def load_split(folder, split, params): return []
def heldout_requests(folder, split, params): return iter(())
def preprocess(body): return torch.zeros(2)
def postprocess(output): return {"label": 0}
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "mine.py"
    file.write_text(text)
    return file


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    user = load_module(write(tmp_path, GOOD))
    model = user.build_model({})
    optimizer = user.build_optimizer(model, {"learning_rate": 0.5, "weight_decay": 0.0})
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["lr"] == 0.5
    assert user.build_scheduler(optimizer, {}, 10) is None
    outputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert user.metrics(outputs, torch.tensor([0, 1, 1])) == {"accuracy": pytest.approx(2 / 3)}
    assert float(user.loss(outputs, torch.tensor([0, 1, 0]))) == pytest.approx(0.3132617)


def test_the_user_s_own_functions_win(tmp_path: Path) -> None:
    user = load_module(write(tmp_path, GOOD + "def metrics(outputs, targets): return {'mine': 1.0}\n"))
    assert user.metrics(None, None) == {"mine": 1.0}


def test_files_beside_it_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "beside_mine.py").write_text("ANSWER = 42\n")
    user = load_module(write(tmp_path, "import beside_mine\n" + GOOD))
    assert user.path.endswith("mine.py")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD.replace("def preprocess(body)", "def other(body)"), "preprocess is missing"),
        (GOOD + "\nload_split = 3\n", "load_split is a int"),
        (GOOD + "\ndef build_model(): pass\n", r"build_model\(\) cannot be called with 1"),
        ("import not_there_at_all\n" + GOOD, r"mine.py:1: cannot be imported: ModuleNotFoundError.*not_there_at_all"),
        (GOOD + "\ndef broken(:\n", r"mine.py:9: cannot be imported: SyntaxError"),
        (GOOD + "\n1 / 0\n", r"mine.py:9: cannot be imported: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(BadModule, match=told):
        load_module(write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadModule, match="does not exist"):
        load_module(tmp_path / "nothing.py")
