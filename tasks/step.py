"""A step is a program: `python -m tasks.step NAME request.json result.json`.

The same program runs as a process on a laptop and as a Kubernetes Job on a cluster, so a step can be repeated by hand
from its JSON. It reads the request into the task's own dataclass, runs the task, and writes the result (or the error,
with its word) in one atomic rename. Exit codes: 0 done, 75 try again, otherwise the error's own (1, 2, 3, 4).
Not covered: who starts it and what happens next (flows.steps), reuse of finished steps (tasks.records).
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # before the other imports: the first process of a pod hears only what it has a handler for
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))

import importlib
import json
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from deployments.errors import GiveUp, StepError, TryAgain

TERMINATION_MESSAGE_BYTES = 4096  # what a kubelet keeps
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
STEPS = (
    "pull_data",
    "register_model",
    "package_model",
    "deploy_model",
    "check_endpoint",
    "write_report",
    "roll_back",
    "audit_endpoint",
)


def load_task(name: str) -> Callable[[Any], Any]:
    """The function `tasks.NAME.NAME`. Raises GiveUp for a name that is no step."""
    if name not in STEPS:
        raise GiveUp(f"step {name!r} is not known; expected one of: {', '.join(STEPS)}")
    return typing.cast("Callable[[Any], Any]", getattr(importlib.import_module(f"tasks.{name}"), name))


def read_request(task: Callable[[Any], Any], raw: dict[str, Any]) -> Any:
    """Build the task's request dataclass from JSON. Raises GiveUp naming the field that is wrong."""
    hints = typing.get_type_hints(task)
    request_type = next(t for n, t in hints.items() if n != "return")
    return from_json(request_type, raw, where=task.__name__)


def from_json(kind: Any, value: Any, *, where: str) -> Any:
    """`value` as `kind` (a dataclass, or JSON as it is). Raises GiveUp naming an unknown or missing field."""
    if isinstance(kind, types.UnionType):  # X | None
        kind = next((k for k in typing.get_args(kind) if is_dataclass(k)), kind) if value is not None else kind
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return value
    if not isinstance(value, dict):
        raise GiveUp(f"{where}: expected an object for {kind.__name__}, got {value!r}")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(value) - known):
        raise GiveUp(f"{where}.{unknown[0]}: unknown field of {kind.__name__}; known: {', '.join(sorted(known))}")
    try:
        return kind(**{k: from_json(hints[k], v, where=f"{where}.{k}") for k, v in value.items()})
    except TypeError as error:
        raise GiveUp(f"{where}: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write and rename, so that a reader never sees half a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=1, sort_keys=True))
    aside.replace(path)


def run_step(name: str, request_path: Path, result_path: Path) -> int:
    """Run one step from its request file to its result file; returns the exit code."""
    began = time.time()
    try:
        task = load_task(name)
        request = read_request(task, json.loads(request_path.read_text()))
        result = task(request)
        document = {
            "ok": True,
            "result": asdict(result) if is_dataclass(result) and not isinstance(result, type) else result,
        }
        code = 0
    except StepError as error:
        document = {"ok": False, "error": {"type": type(error).__name__, "word": error.word, "message": str(error)}}
        code = EXIT_TRY_AGAIN if isinstance(error, TryAgain) else error.exit_code
        print(f"{name}: {error.word}: {error}", file=sys.stderr, flush=True)
    except Exception as error:  # a bug: keep the traceback in the log, the last line in the result
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        document = {"ok": False, "error": {"type": "GiveUp", "word": GiveUp.word, "message": message}}
        code = 1
    document["seconds"] = round(time.time() - began, 3)
    write_json(result_path, document)
    _tell_kubelet(document)
    return code


def _tell_kubelet(document: dict[str, Any]) -> None:
    """In a pod a short result is the termination message too: it is read where the state volume is not mounted."""
    path, text = os.environ.get("REPRISE_TERMINATION_LOG"), json.dumps(document)
    if path and len(text.encode()) <= TERMINATION_MESSAGE_BYTES:
        Path(path).write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: python -m tasks.step NAME request.json result.json\nNAME: {', '.join(STEPS)}")
    code = run_step(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.flush()
    sys.stderr.flush()
    # The result is written: taking MLflow and matplotlib apart again would cost a second and give nothing.
    os._exit(code)
