"""The user's module: one Python file that brings the model, the data set and what the loop should do with them.

Required: build_model(params), load_split(folder, split, params), heldout_requests(folder, split, params),
preprocess(body), postprocess(output). Optional, with the defaults below: loss(output, target),
build_optimizer(model, params), build_scheduler(optimizer, params, total_steps), metrics(outputs, targets).
The file is imported by path, its folder first on sys.path, so that it can import files beside it.
Not covered: sandboxing; the user's code runs with the trainer's rights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import Dataset

REQUIRED = {"build_model": 1, "load_split": 3, "heldout_requests": 3, "preprocess": 1, "postprocess": 1}
OPTIONAL = {"loss": 2, "build_optimizer": 2, "build_scheduler": 3, "metrics": 2}


class BadModule(ValueError):
    """The user's module cannot be used as it is; the message says what, and what was expected."""


@dataclass(frozen=True, kw_only=True)
class UserModule:
    """The functions of the user's module, defaults filled in."""

    path: str
    build_model: Callable[[dict[str, Any]], torch.nn.Module]
    load_split: Callable[[Path, str, dict[str, Any]], Dataset[Any]]
    heldout_requests: Callable[[Path, str, dict[str, Any]], Iterator[tuple[str, bytes, Any]]]
    preprocess: Callable[[bytes], torch.Tensor]
    postprocess: Callable[[torch.Tensor], dict[str, Any]]
    loss: Callable[[Any, Any], torch.Tensor]
    build_optimizer: Callable[[torch.nn.Module, dict[str, Any]], torch.optim.Optimizer]
    build_scheduler: Callable[[torch.optim.Optimizer, dict[str, Any], int], Any]
    metrics: Callable[[Any, Any], dict[str, float]]


def load_module(path: str | Path) -> UserModule:
    """Import the user's file and check its functions. Raises BadModule naming the file and the function."""
    file = Path(path)
    if not file.is_file():
        raise BadModule(f"[model] module: {file} does not exist; expected a Python file with {', '.join(REQUIRED)}")
    module = _import(file)
    functions: dict[str, Any] = {
        "loss": torch.nn.functional.cross_entropy,
        "build_optimizer": default_optimizer,
        "build_scheduler": lambda optimizer, params, total_steps: None,
        "metrics": default_metrics,
    }
    for name, arity in (REQUIRED | OPTIONAL).items():
        function = getattr(module, name, None)
        if function is None and name in OPTIONAL:
            continue
        if not callable(function):
            found = "missing" if function is None else f"a {type(function).__name__}"
            raise BadModule(f"{file}: {name} is {found}; expected a function of {arity} argument(s)")
        if not _takes(function, arity):
            raise BadModule(f"{file}: {name}{inspect.signature(function)} cannot be called with {arity} argument(s)")
        functions[name] = function
    return UserModule(path=str(file), **functions)


def default_optimizer(model: torch.nn.Module, params: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW with params' learning_rate (1e-3) and weight_decay (0.01)."""
    rate, decay = float(params.get("learning_rate", 1e-3)), float(params.get("weight_decay", 0.01))
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)


def default_metrics(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Accuracy of the largest output against the target class, over the whole split."""
    return {"accuracy": float((outputs.argmax(dim=-1) == targets).double().mean())}


def _import(file: Path) -> ModuleType:
    name = f"reprise_user_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise BadModule(f"[model] module: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickling look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        line = _line_in(error, file)
        raise BadModule(f"{file}{line}: cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _line_in(error: BaseException, file: Path) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f":{error.lineno}"
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            line = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return line


def _takes(function: Callable[..., Any], arity: int) -> bool:
    try:
        inspect.signature(function).bind(*range(arity))
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True
