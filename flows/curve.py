"""The training curve as a small SVG, with the interruptions marked, for Prefect's run page.

The flow's pod carries no plotting library, and one polyline needs none. The report's charts are made by
tasks.write_report. Pure: lines of progress in, text out.
"""

from __future__ import annotations

from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 760, 280, 54, 34, 38


def curve_svg(progress: list[dict[str, Any]], attempts: list[dict[str, Any]], title: str) -> str:
    """Loss over steps; a vertical line where an attempt ended too early. Steps without a loss are left out."""
    points = {int(e["step"]): float(e["loss"]) for e in progress if "loss" in e and "step" in e}
    points = {step: loss for step, loss in points.items() if loss == loss and abs(loss) != float("inf")}
    last = max([1, *points])
    low, high = (min(points.values()), max(points.values())) if points else (0.0, 1.0)
    span = (high - low) or 1.0

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * step / last

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (loss - low) / span)

    text = 'font-family="system-ui, sans-serif" font-size="12" fill="#555"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="20" {text} font-weight="600">{escape(title)}</text>',
    ]
    for share in (0.0, 0.5, 1.0):
        loss, step = low + share * span, round(share * last)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(loss) + 4:.1f}" text-anchor="end" {text}>{loss:.3g}</text>')
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 20}" text-anchor="middle" {text}>{step}</text>')
    parts.append(f'<text x="{WIDTH - 20}" y="{HEIGHT - 5}" text-anchor="end" {text}>step</text>')
    line = " ".join(f"{x(s):.1f},{y(loss):.1f}" for s, loss in sorted(points.items()))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#2563eb" stroke-width="1.8"/>')
    for attempt in attempts:
        if attempt["cause"] in ("", "complete", "no_capacity"):
            continue
        at = x(attempt["reached_step"])
        label = f"{attempt['cause']}, step {attempt['reached_step']}"
        anchor = "end" if at > WIDTH / 2 else "start"
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#dc2626" '
            'stroke-dasharray="4 3"/>'
            f'<text x="{at + (-5 if anchor == "end" else 5):.1f}" y="{TOP + 12}" text-anchor="{anchor}" '
            f'font-family="system-ui, sans-serif" font-size="12" fill="#dc2626">{escape(label)}</text>'
        )
    return "".join([*parts, "</svg>"])
