"""How answers are judged, and what a broken heldout.jsonl says."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import GiveUp
from tasks.golden import compare, judge, percentile, read_golden


def line(name: str, **more: Any) -> str:
    row = {"name": name, "body_b64": base64.b64encode(b"x").decode(), "label": 1, "answer": {"label": 1}}
    return json.dumps(row | more)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"label": 1, "scores": [0.5, 0.50005]}, ""),
        ({"label": 1, "scores": [0.5, 0.5], "model": "digits", "model_version": "3"}, ""),
        ({"label": 1, "scores": [0.5, 0.51]}, "numbers differ by 0.01"),
        ({"label": 2, "scores": [0.5, 0.5]}, "label 2, expected 1"),
        ({"label": 1.00001, "scores": [0.5, 0.5]}, "label 1.00001, expected 1"),
        ({"label": "1", "scores": [0.5, 0.5]}, "answer.label: '1', expected 1"),
        ({"label": True, "scores": [0.5, 0.5]}, "answer.label: True, expected 1"),
        ({"label": 1, "scores": [0.5]}, "answer.scores"),
        ({"label": 1, "scores": [0.5, math.nan]}, "answer.scores[1]: nan"),
        ({"label": 1}, "answer: "),
        ({}, "answer: "),
    ],
)
def test_judge(given: dict[str, Any], why: str) -> None:
    verdict = judge(given, {"label": 1, "scores": [0.5, 0.5]}, 1e-4)
    assert verdict.agrees == (why == "") and verdict.why.startswith(why)


def test_compare_of_nested_answers() -> None:
    assert compare({"a": [{"b": None}]}, {"a": [{"b": None}]}, "x") == (0.0, "")
    assert compare({"a": [{"b": 0}]}, {"a": [{"b": None}]}, "x")[1] == "x.a[0].b: 0, expected None"


def test_samples_are_spread_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_text("\n".join(line(f"s{n}") for n in range(10)))
    assert [sample.name for sample in read_golden(path, 5)] == ["s0", "s2", "s4", "s6", "s8"]
    assert len(read_golden(path)) == len(read_golden(path, 99)) == 10
    assert read_golden(f"file://{path}", 1)[0].body == b"x"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no samples"),
        ("{", r"heldout\.jsonl:1: no golden sample"),
        (line("a") + "\n" + line("b", body_b64="&"), r"heldout\.jsonl:2: no golden sample"),
        (line("a", answer={"scores": []}), "answer has no label"),
        ("[]", "no golden sample"),
    ],
)
def test_a_broken_file_names_its_line(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "heldout.jsonl").write_text(text)
    with pytest.raises(GiveUp, match=why):
        read_golden(tmp_path / "heldout.jsonl")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GiveUp, match="the training writes them when it is complete"):
        read_golden(tmp_path / "heldout.jsonl")


def test_percentile() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 0.95) == 95.0
    assert math.isnan(percentile([], 0.5))
