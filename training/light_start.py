"""Spare every start the 1.5 s in which torch's optimizers import its compiler only to tell it to stay away.

torch 2.13 does that in two places: `torch._disable_dynamo`, which imports torch._dynamo on first use unless the
function carries its already wrapped self as `__dynamo_disable`, and the wrapper of `Optimizer.step` for differentiable
optimizers, which marks graph breaks. Without a compiler the plain functions are the right ones.
Not to be called in a process that compiles. Where torch looks different, nothing is changed and nothing breaks.
Not covered: the import of torch itself (training/standby.py).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def use_light_optimizers() -> None:
    """Make the optimizers of torch.optim work without torch's compiler. Call before one is constructed."""
    if "torch._dynamo" in sys.modules:  # too late to win anything
        return
    for name, module in list(sys.modules.items()):
        if name == "torch.optim" or name.startswith("torch.optim."):
            for value in list(vars(module).values()):
                _mark(value)
                if isinstance(value, type) and issubclass(value, torch.optim.Optimizer):
                    for method in vars(value).values():
                        _mark(method)
                    _lighten_step(value)


def _mark(function: Any, depth: int = 2) -> None:
    """Give what `_disable_dynamo` wraps the attribute that it looks for; also inside one more decorator."""
    code = getattr(function, "__code__", None)
    if code is None or depth == 0:
        return
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None and code.co_filename.endswith("_compile.py"):
        wrapped.__dict__.setdefault("__dynamo_disable", wrapped)
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            _mark(cell.cell_contents, depth - 1)


def _lighten_step(kind: type[torch.optim.Optimizer]) -> None:
    step = vars(kind).get("step")
    plain = getattr(step, "__wrapped__", None)
    if plain is not None and getattr(getattr(step, "__code__", None), "co_name", "") == "_use_grad":
        kind.step = _without_graph_breaks(plain)  # type: ignore[method-assign]


def _without_graph_breaks(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, *args, **kwargs)

    return step
