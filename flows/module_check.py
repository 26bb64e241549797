"""The user's module looked at before anything runs: syntax, and the functions that Reprise calls.

Reading it as text costs milliseconds and runs none of it; what only an import can tell (a missing package) is told by
the trainer. Which functions there are stands in training/model.py. Not covered: what they return.
"""

from __future__ import annotations

import ast
import difflib

from deployments.errors import ConfigError

REQUIRED = {
    "build_model": "build_model(params) -> torch.nn.Module",
    "load_split": "load_split(folder, split, params) -> Dataset of (input, target)",
    "heldout_requests": "heldout_requests(folder, split, params) -> iterator of (name, body, label)",
    "preprocess": "preprocess(body) -> input tensor",
    "postprocess": "postprocess(output) -> dict with 'label'",
}


def check_module(text: str, name: str) -> None:
    """`text` of the module called `name` in messages. Raises ConfigError for broken syntax or a missing function."""
    try:
        tree = ast.parse(text, filename=name)
    except SyntaxError as error:
        shown = (error.text or "").strip()
        raise ConfigError(
            f"{name}:{error.lineno}: [model] module: {error.msg}: {shown!r}; expected valid Python"
        ) from None
    defined = _names(tree)
    missing = [f for f in REQUIRED if f not in defined]
    if missing:
        near = {f: difflib.get_close_matches(f, sorted(defined), 1) for f in missing}
        told = [f"{REQUIRED[f]}" + (f" (did you mean {near[f][0]}?)" if near[f] else "") for f in missing]
        raise ConfigError(f"{name}: [model] module lacks {'; '.join(told)}; define it at the module's top level")


def _names(tree: ast.Module) -> set[str]:
    """What the module defines or imports at its top level."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif isinstance(node, ast.Assign):
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return names
