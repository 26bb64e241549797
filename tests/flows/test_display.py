"""Plain lines where nobody watches, units that a person reads."""

from __future__ import annotations

import json
import time

import pytest

from flows import display


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.04, "40 ms"), (9.94, "9.9 s"), (59, "59.0 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(value: float | None, text: str) -> None:
    assert display.seconds(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e12, "3.0 TB")]
)
def test_sizes(count: float, text: str) -> None:
    assert display.size(count) == text


def test_a_table_is_tab_separated_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    display.table(["a", "b"], [["1", "[red]2"]])
    assert capsys.readouterr().out == "a\tb\n1\t[red]2\n"


def test_json_is_sorted_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    display.show_json({"b": 1, "a": [None, 0.5]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 0.5], "b": 1}


def test_an_error_goes_to_standard_error_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    display.complain("file.toml:3: wrong")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: file.toml:3: wrong\n")


def test_ago() -> None:
    assert display.ago(time.time() - 61) == "1 min 01 s ago"
    assert display.ago(None) == ""
