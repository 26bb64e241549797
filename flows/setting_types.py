"""The kinds of value that settings have: counts, durations, sizes, paths; each refuses what it is not, in words.

A secret is a reference that stays one: it is looked up by whoever needs it, never when the file is read.
Not covered: which keys exist (flows.settings, flows.place_settings, flows.trigger_settings).
"""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from flows.quantities import parse_duration, parse_memory


def _memory(value: Any) -> Any:
    parse_memory(value)
    return value


def _memory_or_none(value: Any) -> Any:
    return value if value == "" else _memory(value)


def as_tuple(value: Any) -> Any:
    """A TOML array, for a frozen model."""
    return tuple(value) if isinstance(value, list) else value


def _scalar(value: Any) -> Any:
    if not isinstance(value, str | int | float | bool):
        raise ValueError("expected text, a number, true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number, not nan or inf")
    return value


def _relative(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    path = PurePosixPath(value)
    if not value or path.is_absolute() or value.startswith("-") or "\\" in value or "\0" in value:
        raise ValueError("expected a path relative to the folder of pipeline.toml, with forward slashes")
    return value


def _inside(value: Any) -> Any:
    if isinstance(_relative(value), str) and ".." in PurePosixPath(value).parts:
        raise ValueError("expected a path inside the folder of pipeline.toml, without '..'")
    return value


def _python_file(value: Any) -> Any:
    if isinstance(_inside(value), str) and not (value.endswith(".py") and PurePosixPath(value).stem.isidentifier()):
        raise ValueError('expected the name of a Python file such as "digits.py"')
    return value


def _reference(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}|file:/[^\0\n]+", value):
        raise ValueError('expected a reference to a secret, "${NAME}" of the environment or "file:/absolute/path"')
    return value


class Unfilled:
    """Marks a field whose ${NAME} is not filled in when the file is read."""


Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Duration = Annotated[float, BeforeValidator(parse_duration)]  # seconds; "10m" in the file
Memory = Annotated[str, BeforeValidator(_memory)]  # Kubernetes quantity
OptionalMemory = Annotated[str, BeforeValidator(_memory_or_none)]  # or ""
Port = Annotated[int, Field(ge=1024, le=65535)]
DataPath = Annotated[str, BeforeValidator(_relative)]  # may lead up, as long as it stays inside the repository
CodePath = Annotated[str, BeforeValidator(_inside)]
PythonFile = Annotated[str, BeforeValidator(_python_file)]
Scalar = Annotated[Any, BeforeValidator(_scalar)]
SecretReference = Annotated[str, BeforeValidator(_reference), Unfilled()]


class Section(BaseModel):
    """A table of a settings file: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
