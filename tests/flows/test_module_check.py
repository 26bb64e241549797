"""The user's module before it runs: what is missing is named, what is there is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.errors import ConfigError
from flows.module_check import REQUIRED, check_module

EXAMPLES = Path(__file__).resolve().parents[2] / "training" / "examples"
WHOLE = "\n".join(f"def {name}(*a): ..." for name in REQUIRED)


@pytest.mark.parametrize(
    "path", [EXAMPLES / "digits" / "digits.py", EXAMPLES / "tumours" / "tumours.py"], ids=lambda p: p.stem
)
def test_the_examples_pass(path: Path) -> None:
    check_module(path.read_text(), path.name)


def test_functions_may_be_imported_or_assigned() -> None:
    check_module(WHOLE.replace("def build_model(*a): ...", "from net import build_model"), "m.py")
    check_module(WHOLE.replace("def preprocess(*a): ...", "preprocess = bytes"), "m.py")


def test_a_missing_function_is_named_with_its_form_and_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError, match=r"m.py: \[model\] module lacks build_model\(params\).*did you mean build_models\?"
    ):
        check_module(WHOLE.replace("build_model", "build_models"), "m.py")


def test_broken_syntax_is_told_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"m.py:2: .*'\(' was never closed.*def g\("):
        check_module("def f(): ...\ndef g(\n", "m.py")
