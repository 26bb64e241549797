"""The command line: exit codes and messages of a user's mistakes, never a traceback."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import App

from flows.__main__ import app, main

PIPELINE = '[pipeline]\nname = "digits"\n[data]\npath = "data/digits"\n[model]\nmodule = "digits.py"\n'
POINTER = "outs:\n- md5: {}.dir\n  size: 10\n  nfiles: 2\n  hash: md5\n  path: digits\n"
MODULE = "\n".join(
    f"def {name}(*a): ..." for name in ("build_model", "load_split", "heldout_requests", "preprocess", "postprocess")
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc" / "config").write_text(
        "[core]\n    remote = r\n['remote \"r\"']\n    url = ../remote\n    verify = true\n"
    )
    (folder / "data").mkdir()
    (folder / "data" / "digits.dvc").write_text(POINTER.format("a" * 32))
    (folder / "pipeline.toml").write_text(PIPELINE)
    (folder / "digits.py").write_text(MODULE)
    commit(folder, init=True)
    monkeypatch.chdir(folder)
    return folder


def commit(folder: Path, *, init: bool = False) -> None:
    if init:
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    subprocess.run(["git", *identity, "commit", "-qm", "x"], cwd=folder, check=True)


def reprise(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_plan_starts_nothing_and_is_json_when_asked(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reprise("plan", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["data_digest"] == "a" * 32 + ".dir"
    assert [s["reused"] for s in document["steps"]] == [False] * 6
    assert not (project / ".reprise").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--rev", "nowhere"], "nowhere"),
        (["plan", "--rev=--upload-pack=touch"], "--upload-pack=touch"),
        (["plan", "--pipeline", "other.toml"], "other.toml: no such file"),
        (["plan", "--set", "train.epoch=3"], "did you mean"),
        (["plan", "--set", "train.epochs=-3"], "epochs"),
        (["plan", "--place", "moon"], "moon"),
        (["show"], "there is no run"),
        (["show", "digits-7"], "run 'digits-7' does not exist"),
        (["logs", "--step", "pull"], "there is no run"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    project: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reprise(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("arguments", [["plam"], ["run", "--nope"], ["run", "extra"]])
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert reprise(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_no_project_names_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reprise("run") == 2
    assert "reprise demo" in capsys.readouterr().err


def test_a_module_that_lacks_a_function_is_told_before_anything_runs(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "digits.py").write_text(MODULE.replace("postprocess", "postproces"))
    commit(project)
    assert reprise("run") == 2
    assert "did you mean postproces?" in capsys.readouterr().err
    assert not (project / ".reprise").exists()


def test_a_remote_that_does_not_verify_is_a_failed_preflight(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = project / ".dvc" / "config"
    config.write_text(config.read_text().replace("verify = true", ""))
    commit(project)
    assert reprise("plan") == 3
    assert "verify true" in capsys.readouterr().err


def commands(below: App = app, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name in below:
        if not name.startswith("-"):
            yield (*before, name)
            yield from commands(below[name], (*before, name))


@pytest.mark.parametrize("command", [(), *commands()], ids=" ".join)
def test_every_command_explains_itself(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal of 80 columns: what it does, what each option is, how it ends."""
    monkeypatch.setenv("COLUMNS", "80")
    assert reprise(*command, "--help") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "Usage:" in text and "Exit codes: 0 fine" in text
    rows = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    assert [row for row in rows if len(row.split("  ", 1)) == 1 and row.startswith("-")] == [], (
        "an option without a word"
    )
    assert not any(empty in text for empty in ('[default: ""]', "[default: ()]", "[default: False]"))


def test_the_overview_has_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert reprise("--help") == 0
    first_words = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("│ ")]
    assert {name for (name,) in [c for c in commands() if len(c) == 1]} <= set(first_words)
