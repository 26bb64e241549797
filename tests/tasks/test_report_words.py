"""The report's numbers and durations, as a person reads them."""

from __future__ import annotations

from typing import Any

import pytest

from tasks import report_words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0, "0.0 ms"),
        (0.0041, "4.1 ms"),
        (0.213, "213 ms"),
        (0.9996, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3725, "1 h 02 min"),
        (90000, "1 d 01 h"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert report_words.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.977777, "0.9778"), (360.0, "360"), (12345, "12\u202f345"), (float("nan"), "nan"), (None, "–"), (1e-7, "1e-07")],
)
def test_numbers(value: Any, text: str) -> None:
    assert report_words.number(value) == text
