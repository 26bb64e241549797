"""A settings text checked against a model, and every mistake as `file:line: [section] key = value: expected ..., fix`.

All mistakes of a file come in one ConfigError, a line each, in the order of the file. Not covered: which keys exist and
what they mean (flows.settings), where keys stand (flows.toml_lines).
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deployments.errors import ConfigError
from flows.references import expand, is_literal_secret
from flows.setting_types import Unfilled
from flows.toml_lines import KeyPath, key_lines

Model = TypeVar("Model", bound=BaseModel)
Problem = tuple[int, str]  # line (0: the command line) and the whole message
_MISSING = object()
_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")

_EXPECTED = {
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "string_type": "expected text in quotes",
    "bool_type": "expected true or false",
    "finite_number": "expected a finite number, not nan or inf",
    "greater_than": "expected a number greater than {gt}",
    "greater_than_equal": "expected a number of at least {ge}",
    "less_than_equal": "expected a number of at most {le}",
    "literal_error": "expected {expected}",
    "string_too_short": "expected some text",
    "too_short": "expected at least one",
    "tuple_type": 'expected a list such as ["a", "b"]',
    "dict_type": "expected a table of keys and values",
    "model_type": "expected a section of keys and values",
    "model_attributes_type": "expected a section of keys and values",
}


@dataclass(frozen=True, kw_only=True)
class SettingsText:
    """A parsed settings file with what is needed to tell where a mistake stands."""

    # Not compared: settings that say the same are the same, wherever they were written.
    name: str = field(compare=False)
    raw: dict[str, Any] = field(compare=False)  # as written, overrides included
    lines: dict[KeyPath, int] = field(compare=False)
    overrides: dict[KeyPath, str] = field(default_factory=dict, compare=False)  # path -> "train.epochs=3"

    def say(self, path: KeyPath, expected: str) -> Problem:
        """One mistake: its line, and the message with place, key and the value as it stands in the file."""
        found = _lookup(self.raw, path)
        value = "" if found is _MISSING or isinstance(found, Mapping) else f" = {_shown(path, found)}"
        if (override := self.overrides.get(path)) is not None:
            return 0, f"--set {override.partition('=')[0]}{value}: {expected}"
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), 1)
        top = len(path) == 1 and found is not _MISSING and not isinstance(found, Mapping)
        return (line, f"{self.name}:{line}: {path[0] if top else _dotted(path)}{value}: {expected}")

    def refusal(self, path: KeyPath, expected: str) -> ConfigError:
        """One mistake as the error to raise."""
        return ConfigError(self.say(path, expected)[1])


def read_file(path: Path, name: str, *, what: str) -> str:
    """The text of a settings file. Raises ConfigError if there is none or it is no text."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file; expected {what}; give another with its path, or make one") from None
    except IsADirectoryError:
        raise ConfigError(f"{name}: is a folder; expected {what}; name the file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: byte {error.start} is not UTF-8; expected {what}, which is UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}); expected {what}") from None


def read_toml(text: str, name: str, overrides: Sequence[str], *, example: str) -> SettingsText:
    """Parse a settings text and lay `overrides` over it. Raises ConfigError for broken TOML and bad overrides."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.strip():
        raise ConfigError(f"{name}:1: the file is empty; expected at least:\n{example}")
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_broken(text, name, str(error))) from None
    if not raw:
        raise ConfigError(f"{name}:1: the file holds nothing but comments; expected at least:\n{example}")
    overridden: dict[KeyPath, str] = {}
    for override in overrides:
        overridden[_lay(raw, override)] = override
    return SettingsText(name=name, raw=raw, lines=key_lines(text), overrides=overridden)


def check(model: type[Model], read: SettingsText) -> Model:
    """The settings as `model`, environment references filled in. Raises ConfigError with every mistake, a line each."""
    problems: dict[KeyPath, Problem] = {}
    values = _filled(model, read, read.raw, (), problems)
    checked: Model | None = None
    try:
        checked = model.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problems.setdefault(detail["loc"], _explain(model, read, detail))
    if problems or checked is None:
        raise ConfigError("\n".join(message for _, message in sorted(problems.values(), key=lambda p: p[0])))
    return checked


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean "epochs"?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


def _filled(
    model: type[BaseModel], read: SettingsText, value: Any, path: KeyPath, problems: dict[KeyPath, Problem]
) -> Any:
    if isinstance(value, Mapping):
        return {k: _filled(model, read, v, (*path, k), problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(model, read, v, (*path, i), problems) for i, v in enumerate(value)]
    if not isinstance(value, str) or _stays(model, path):
        return value
    if is_literal_secret(path, value):
        variable = re.sub(r"\W", "_", str(next(p for p in reversed(path) if isinstance(p, str)))).upper()
        problems[path] = read.say(
            path, f'expected no secret in a file that git keeps; put it in the environment and write "${{{variable}}}"'
        )
        return value
    try:
        return expand(value, os.environ)
    except ValueError as error:
        problems[path] = read.say(path, str(error))
        return value


def _stays(model: type[BaseModel], path: KeyPath) -> bool:
    """Whether the field keeps its reference to a secret as it is written."""
    home = _model_at(model, path[:-1]) if path else None
    field_info = home.model_fields.get(str(path[-1])) if home else None
    return field_info is not None and any(isinstance(mark, Unfilled) for mark in field_info.metadata)


def _explain(model: type[BaseModel], read: SettingsText, error: ErrorDetails) -> Problem:
    path, kind, context = error["loc"], error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return read.say(path, _unknown(model, path, section=isinstance(_lookup(read.raw, path), Mapping)))
    if kind == "missing":
        if len(path) == 1:
            inner = _model_at(model, path)
            keys = [n for n, f in inner.model_fields.items() if f.is_required()] if inner else []
            return read.say(path, f"expected this section, with {' and '.join(keys)}; add it")
        return read.say(path, f"expected this key; add: {path[-1]} = ...")
    if kind == "value_error":
        return read.say(path, str(context["error"]))
    found = _lookup(read.raw, path)
    expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else error["msg"]
    if kind in ("int_type", "float_type", "bool_type") and isinstance(found, str):
        expected += ", without quotes" + ("; an environment reference is always text" if "${" in found else "")
    return read.say(path, expected)


def _unknown(model: type[BaseModel], path: KeyPath, *, section: bool) -> str:
    parent, word = _model_at(model, path[:-1]), str(path[-1])
    known = list(parent.model_fields) if parent else []
    hint = did_you_mean(word, known)
    if not hint:
        homes = [p for p in _sections(model) if (m := _model_at(model, p)) and word in m.model_fields]
        hint = f"; it belongs in {_dotted(homes[0])}" if homes else ""
    kind = "section" if section and len(path) == 1 else "key"
    return f"unknown {kind}{hint}; expected one of: {', '.join(known)}"


def _model_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    for part in path:
        if isinstance(part, int):
            continue  # an element has the model of its list
        found = model.model_fields.get(part)
        inner = found.annotation if found else None
        if get_origin(inner) is tuple:
            inner = get_args(inner)[0]
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return None
        model = inner
    return model


def _sections(model: type[BaseModel], path: KeyPath = ()) -> list[KeyPath]:
    found: list[KeyPath] = []
    for name in model.model_fields:
        if inner := _model_at(model, (name,)):
            found += [(*path, name), *_sections(inner, (*path, name))]
    return found


def _lookup(document: Any, path: KeyPath) -> Any:
    for part in path:
        try:
            document = document[part]
        except (KeyError, IndexError, TypeError):
            return _MISSING
    return document


def _dotted(path: KeyPath) -> str:
    """("train", "params", "width") -> "[train.params] width"; a lone section -> "[train]"."""
    keys = [str(p) for p in path if isinstance(p, str)]
    element = "".join(f"[{p}]" for p in path if isinstance(p, int))
    return f"[{'.'.join(keys[:-1])}] {keys[-1]}{element}" if len(keys) > 1 else f"[{keys[0]}]{element}"


def _shown(path: KeyPath, value: Any) -> str:
    if is_literal_secret(path, value):
        return '"***"'
    if isinstance(value, list):
        return "[" + ", ".join(_shown(path, v) for v in value) + "]"
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=not value.isprintable())
        return text if len(text) <= 80 else f'{text[:76]}..."'
    return str(value).lower() if isinstance(value, bool) else str(value)


def _lay(raw: dict[str, Any], override: str) -> KeyPath:
    """Put "train.epochs=3" into the document; returns its path."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not _PATH.fullmatch(dotted):
        raise ConfigError(f"--set {override}: expected section.key=value; for instance --set train.epochs=3")
    *above, key = path = tuple(dotted.split("."))
    table = raw
    for part in above:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: expected a section, and {part} is a value; see the keys in the file")
    try:
        parsed = tomllib.loads(f"value = {text}")
        table[key] = parsed["value"] if set(parsed) == {"value"} else text
    except tomllib.TOMLDecodeError:
        table[key] = text  # text needs no quotes on the command line
    return path


def _broken(text: str, name: str, message: str) -> str:
    """Where TOML is broken, with the line itself and the likely fix."""
    at = re.search(r"\(at line (\d+), column (\d+)\)", message)
    lines = text.split("\n")
    number = int(at[1]) if at else max((n for n, line in enumerate(lines, 1) if line.strip()), default=1)
    line = lines[min(number, len(lines)) - 1].strip()
    secret = is_literal_secret((re.split("[=:]", line)[0].strip(" \"'"),), line)
    said = re.sub(r"\s*\(at [^)]*\)$", "", message)
    word = re.match(r"([\w.\"-]+)\s*=\s*([^\s\"'\[{#][^#]*?)\s*(#.*)?$", line)
    if said.startswith("Cannot overwrite"):
        fix = "the key stands twice; keep one"
    elif said.startswith("Cannot declare"):
        fix = "the section stands twice; keep one"
    elif re.match(r"[\w.-]+\s*:", line):
        fix = "TOML writes key = value, not key: value"
    elif word and word[2] in ("True", "False"):
        fix = f"write {word[1]} = {word[2].lower()}"
    elif word and not secret:
        fix = f'if it is text, put it in quotes: {word[1]} = "{word[2]}"'
    elif line.endswith("="):
        fix = "give the key a value"
    else:
        fix = "close what was opened: quotes, brackets, braces"
    shown = "a line with a secret" if secret else repr(line[:80])
    return f"{name}:{number}: {shown}: expected TOML, found: {said[:1].lower()}{said[1:]}; {fix}"
