"""The curve: valid SVG, interruptions marked, odd progress survived."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

from flows.curve import curve_svg

SVG = "{http://www.w3.org/2000/svg}"
ATTEMPTS = [
    {"cause": "spot", "reached_step": 30},
    {"cause": "user_error", "reached_step": 60},
    {"cause": "complete", "reached_step": 100},
]


def test_the_curve_has_one_point_a_step_and_one_mark_an_interruption() -> None:
    progress = [{"step": s, "loss": 1 / (s + 1)} for s in range(1, 101)] + [{"event": "saved", "step": 30}]
    root = ElementTree.fromstring(curve_svg(progress, ATTEMPTS, "loss <of> a run"))
    line = root.find(f"{SVG}polyline")
    assert line is not None
    assert len(line.attrib["points"].split()) == 100
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert "spot, step 30" in texts
    assert "user_error, step 60" in texts
    assert texts[0] == "loss <of> a run"
    assert not any("complete" in (t or "") for t in texts)


def test_a_replayed_step_counts_once_and_a_loss_that_is_no_number_is_left_out() -> None:
    progress = [
        {"step": 1, "loss": 2.0},
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": math.nan},
        {"step": 3, "loss": math.inf},
    ]
    root = ElementTree.fromstring(curve_svg(progress, [], "t"))
    line = root.find(f"{SVG}polyline")
    assert line is not None
    assert len(line.attrib["points"].split()) == 1


def test_no_progress_is_an_empty_curve() -> None:
    assert ElementTree.fromstring(curve_svg([], ATTEMPTS, "t")).tag == f"{SVG}svg"
