"""A step is a program: request in, result or error out, exit code by the error's word."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from deployments.errors import GiveUp, TryAgain
from tasks import step


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Ask:
    name: str
    inner: Inner = Inner()


@dataclass(frozen=True, kw_only=True)
class Answer:
    text: str


def fake_step(request: Ask) -> Answer:
    if request.name == "away":
        raise TryAgain("the server is away")
    if request.name == "bad":
        raise GiveUp("no such thing")
    if request.name == "bug":
        raise ZeroDivisionError("oops")
    return Answer(text=f"{request.name}:{request.inner.size}")


@pytest.fixture(autouse=True)
def _known_step(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("tasks.fake_step")
    module.fake_step = fake_step  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tasks.fake_step", module)
    monkeypatch.setattr(step, "STEPS", ("fake_step",))


def run(tmp_path: Path, request: object, name: str = "fake_step") -> tuple[int, dict[str, object]]:
    (tmp_path / "request.json").write_text(json.dumps(request))
    code = step.run_step(name, tmp_path / "request.json", tmp_path / "out" / "result.json")
    return code, json.loads((tmp_path / "out" / "result.json").read_text())


def test_a_result_is_written_with_its_seconds(tmp_path: Path) -> None:
    code, document = run(tmp_path, {"name": "a", "inner": {"size": 3}})
    assert (code, document["ok"], document["result"]) == (0, True, {"text": "a:3"})
    assert isinstance(document["seconds"], float)


@pytest.mark.parametrize(
    ("name", "code", "word", "message"),
    [
        ("away", step.EXIT_TRY_AGAIN, "try again", "the server is away"),
        ("bad", 1, "give up", "no such thing"),
        ("bug", 1, "give up", "ZeroDivisionError: oops"),
    ],
)
def test_an_error_is_told_by_its_word_and_exit_code(
    tmp_path: Path, name: str, code: int, word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, {"name": name})[0] == code
    error = run(tmp_path, {"name": name})[1]["error"]
    assert isinstance(error, dict)
    assert (error["word"], error["message"]) == (word, message)
    assert ("Traceback" in capsys.readouterr().err) == (name == "bug")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"name": "a", "colour": 1}, "fake_step.colour: unknown field of Ask; known: inner, name"),
        ({"name": "a", "inner": {"seize": 1}}, "fake_step.inner.seize: unknown field of Inner; known: size"),
        ({"name": "a", "inner": 3}, "fake_step.inner: expected an object for Inner, got 3"),
        ({}, "missing 1 required keyword-only argument: 'name'"),
    ],
)
def test_a_wrong_request_names_the_field(tmp_path: Path, request_: object, message: str) -> None:
    code, document = run(tmp_path, request_)
    assert code == 1
    assert message in str(document["error"])


@pytest.mark.parametrize(("name", "told"), [("a", True), ("a" * 5000, False)])
def test_in_a_pod_a_short_result_is_the_termination_message(
    tmp_path: Path, name: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "termination-log"
    monkeypatch.setenv("REPRISE_TERMINATION_LOG", str(log))
    _, document = run(tmp_path, {"name": name})
    assert log.exists() == told
    if told:
        assert json.loads(log.read_text()) == document


def test_an_unknown_step_names_the_known_ones(tmp_path: Path) -> None:
    code, document = run(tmp_path, {}, name="os")
    assert code == 1
    assert "expected one of: fake_step" in str(document["error"])


def test_the_program_says_how_it_is_called() -> None:
    done = subprocess.run([sys.executable, "-m", "tasks.step"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    usage, names = done.stderr.splitlines()
    assert usage == "usage: python -m tasks.step NAME request.json result.json"
    assert names.startswith("NAME: pull_data, ") and names.endswith(", audit_endpoint")
