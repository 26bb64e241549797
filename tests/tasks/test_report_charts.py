"""The report's loss curve: which attempt wrote which loss, and how it is drawn."""

from __future__ import annotations

from pathlib import Path

from tasks.report_charts import Mark, Piece, loss_curve, pieces_of
from tasks.write_report import read_lines
from tests.tasks.report_kit import make_document, make_files


def test_losses_belong_to_the_attempt_that_wrote_them(tmp_path: Path) -> None:
    document, files = make_document(), make_files(tmp_path)
    first, second, third = pieces_of(read_lines(files["progress"]), document["attempts"])
    assert (first.steps[0], first.steps[-1]) == (1, 40)
    assert (second.steps[0], second.steps[-1], second.kept) == (41, 90, 70)
    assert (third.steps[0], third.steps[-1]) == (71, 200)
    broken = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": None}, {"event": "saved", "step": 3}]
    assert pieces_of(broken, []) == [] and pieces_of(broken, document["attempts"]) == []


def test_curve_has_the_pages_colours_and_few_points() -> None:
    count = 200_000
    progress = [{"step": i, "loss": 1 + 1 / (i + 1), "time": float(i)} for i in range(count)]
    (piece,) = pieces_of(progress, [])
    assert len(piece.steps) < 3100 and piece.steps[-1] == count - 1
    svg = loss_curve([piece], [Mark(step=500, number=1), Mark(step=600, number=2)], width=920, height=300, label="<x>")
    assert svg.startswith("<svg viewBox=") and svg.endswith("</svg>") and len(svg) < 200_000
    assert "var(--accent)" in svg and "var(--interruption)" in svg and "#0a0b" not in svg
    assert 'aria-label="&lt;x&gt;"' in svg and "<style" not in svg and "<metadata" not in svg


def test_only_a_loss_that_came_out_otherwise_is_dashed() -> None:
    first = Piece(steps=list(range(60)), losses=[1.0] * 60, kept=40)
    same = Piece(steps=list(range(41, 90)), losses=[1.0] * 49)
    other = Piece(steps=list(range(41, 90)), losses=[2.0] * 49)
    size = {"width": 360, "height": 240, "label": "loss"}
    assert "stroke-dasharray" not in loss_curve([first, same], [], **size)
    assert "stroke-dasharray" in loss_curve([first, other], [], **size)


def test_curve_without_points_or_of_one_point_is_drawn() -> None:
    assert "<svg" in loss_curve([Piece(steps=[1], losses=[0.5])], [], width=360, height=240, label="loss")
    assert "<svg" in loss_curve([Piece(steps=[1, 2], losses=[-1.0, 0.0], kept=0)], [], width=360, height=240, label="l")
