"""The report's loss curve as SVG text that can be put into an HTML page.

Drawn by matplotlib without a display. Colours are CSS variables of the page, so one picture serves the light and the
dark scheme; text stays text; the same numbers give the same bytes. Where an attempt ended before the training did, a
numbered mark stands, and the steps that had to be trained again are shaded (dashed if their loss came out otherwise).
The page tells in words what each number was.
Not covered: everything of the page that HTML can draw by itself (tasks/report.html.j2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Colours that matplotlib takes; replaced in its output by the page's variables.
COLOURS = {
    "#0a0b01": "--muted",
    "#0a0b02": "--grid",
    "#0a0b03": "--accent",
    "#0a0b04": "--interruption",
    "#0a0b05": "--card",
    "#0a0b06": "--bad",
}
MUTED, GRID, ACCENT, CUT, CARD, BAD = COLOURS
POINTS = 1500  # drawn per attempt; a page needs no more than its pixels


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The losses of one attempt. `kept` is the last step that a checkpoint holds: what came after was trained again."""

    steps: list[int]
    losses: list[float]
    kept: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The end of an attempt before the training's, with the number it has in the page's list."""

    step: int
    number: int
    error: bool = False  # not an interruption


def pieces_of(progress: Sequence[dict[str, Any]], attempts: Sequence[dict[str, Any]]) -> list[Piece]:
    """The trainer's lines, split by the attempt that wrote them (by time). Lines without a finite loss are left out."""
    points = [(float(e.get("time", 0)), int(e["step"]), float(e["loss"])) for e in progress if _has_loss(e)]
    if not attempts:
        return [_piece(points, math.inf)] if points else []
    pieces = []
    for index, attempt in enumerate(attempts):
        last = index + 1 == len(attempts)
        began = -math.inf if index == 0 else float(attempt["started"])
        until = math.inf if last else float(attempts[index + 1]["started"])
        mine = [p for p in points if began <= p[0] < until]
        if mine:
            complete = attempt.get("cause") in ("", "complete")
            pieces.append(_piece(mine, math.inf if complete else float(attempt.get("to_step", math.inf))))
    return pieces


def _has_loss(entry: dict[str, Any]) -> bool:
    loss = entry.get("loss")
    return "step" in entry and isinstance(loss, int | float) and math.isfinite(loss)


def _piece(points: list[tuple[float, int, float]], kept: float) -> Piece:
    points = sorted({step: (when, step, loss) for when, step, loss in reversed(points)}.values(), key=lambda p: p[1])
    stride = max(1, len(points) // POINTS)
    some = points[::stride]
    if some[-1] != points[-1]:
        some.append(points[-1])
    return Piece(steps=[p[1] for p in some], losses=[p[2] for p in some], kept=kept)


def loss_curve(pieces: Sequence[Piece], marks: Sequence[Mark], *, width: float, height: float, label: str) -> str:
    """One <svg> element of `width` x `height` CSS pixels, scaling with its box. `label` is for screen readers."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"reprise-{width:g}",
        "font.family": "sans-serif",
        "font.size": 9,  # points: 12 CSS pixels
        "path.simplify": True,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width / 96, height / 96), dpi=96)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_position((52 / width, 40 / height, 1 - 66 / width, 1 - 70 / height))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        _draw(axes, pieces, narrow=width < 500)
        _draw_marks(axes, marks, [p for piece in pieces for p in piece.steps], width)
        return _inline(figure, label)


def _draw(axes: Any, pieces: Sequence[Piece], *, narrow: bool) -> None:
    # The last word on a step counts. A resume repeats its steps exactly, so the first may be the only one recorded.
    curve = {step: loss for piece in pieces for step, loss in zip(piece.steps, piece.losses, strict=True)}
    steps = sorted(curve)
    values = [curve[s] for s in steps]
    dots = {"marker": "o", "markersize": 3.5} if len(steps) < 60 else {}
    if len(steps) > 250:  # single batches jump: show them faintly and their running mean on top
        axes.plot(steps, values, color=ACCENT, linewidth=0.8, alpha=0.3)
        values = _smooth(values)
    axes.plot(steps, values, color=ACCENT, linewidth=1.8, solid_joinstyle="round", **dots)
    for piece in pieces:
        lost = [(s, v) for s, v in zip(piece.steps, piece.losses, strict=True) if s > piece.kept]
        if lost:
            axes.axvspan(piece.kept, lost[-1][0], color=CUT, alpha=0.16, linewidth=0)
        if other := [(s, v) for s, v in lost if not math.isclose(curve[s], v, rel_tol=1e-6)]:
            axes.plot(*zip(*other, strict=True), color=CUT, linewidth=1.2, linestyle=(0, (3, 2)), **dots)
    losses = [v for piece in pieces for v in piece.losses]
    if losses and min(losses) > 0 and max(losses) / min(losses) > 100:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0 if losses and min(losses) >= 0 else None)
    axes.margins(x=0.01)
    axes.grid(axis="y", color=GRID, linewidth=0.75)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, length=0, pad=6, which="both")
    axes.locator_params(axis="x", nbins=5 if narrow else 9, integer=True)
    if axes.get_yscale() == "linear":
        axes.locator_params(axis="y", nbins=5)
    axes.set_xlabel("step", color=MUTED, loc="right", labelpad=2)
    axes.set_title("training loss", color=MUTED, loc="left", fontsize=9, pad=14, x=-38 / axes.bbox.width)


def _smooth(values: list[float]) -> list[float]:
    """Mean over a window around each value, which shrinks towards the ends so that the curve does not lag."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half, last = max(2, len(values) // 40), len(values) - 1
    means = []
    for i in range(len(values)):
        reach = min(half, i, last - i)
        means.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return means


def _draw_marks(axes: Any, marks: Sequence[Mark], steps: Sequence[int], width: float) -> None:
    """A line and a numbered badge per interruption; badges that would touch go one row up."""
    span = max(1, max(steps, default=1) - min(steps, default=0))
    apart = 22 / width * span
    row, before = 0, -math.inf
    for mark in sorted(marks, key=lambda m: m.step):
        row = (row + 1) % 2 if mark.step - before < apart else 0
        before = mark.step
        colour = BAD if mark.error else CUT
        axes.axvline(mark.step, color=colour, linewidth=1.2)
        axes.annotate(
            str(mark.number),
            (mark.step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 8 + 9 * row),
            textcoords="offset points",
            ha="center",
            va="center",
            color=CARD,
            fontsize=8,
            fontweight="bold",
            annotation_clip=False,
            bbox={"boxstyle": "circle,pad=0.25", "facecolor": colour, "edgecolor": "none"},
        )


def _inline(figure: Any, label: str) -> str:
    """matplotlib's file as one element of a page: no prologue, no ids but those it refers to, the page's colours."""
    import io
    from html import escape

    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL
    )
    text = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|PathCollection)[^"]*"', "", text)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{escape(label)}">', text
    )
    text = re.sub(r"font: ((?:bold |700 )?)([0-9.]+)px [^;\"]*", r"font: \g<1>\g<2>px var(--sans)", text)
    for colour, variable in COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r">\s+<", "><", text).strip()
