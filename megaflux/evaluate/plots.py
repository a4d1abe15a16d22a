"""Small plots as SVG: lines over t, and figures with their intervals. No library draws them, so that a report is one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 460, 260, 46, 34, 12, 150


def lines(x: Sequence[float], series: Mapping[str, Sequence[float | None]], x_label: str) -> str:
    """One line for each series over x; gaps where a value is None."""
    values = [value for row in series.values() for value in row if value is not None]
    if not values or len(x) < 2:
        return ""
    top = max(values) * 1.05 or 1.0
    across, up = _scale(min(x), max(x), LEFT, WIDTH - RIGHT), _scale(0, top, HEIGHT - BOTTOM, TOP)
    parts = [_frame(x_label)]
    for i in range(5):
        value = top * i / 4
        parts.append(_text(LEFT - 5, up(value) + 4, f"{value:.3g}", "end"))
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(value):.1f}" y2="{up(value):.1f}" stroke="#ddd"/>'
        )
    for value in (min(x), (min(x) + max(x)) / 2, max(x)):
        parts.append(_text(across(value), HEIGHT - BOTTOM + 14, f"{value:.3g}", "middle"))
    for number, (name, row) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in zip(x, row, strict=True) if b is not None)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(_text(WIDTH - RIGHT + 10, TOP + 14 + 16 * number, name, "start", colour))
    return _svg(WIDTH, HEIGHT, parts)


def bars(figures: Mapping[str, Mapping[str, object]], top: float = 1.0) -> str:
    """A dot for each figure with its interval as a line, from 0 to `top`. figures: name -> {"value", "interval"}."""
    left, right, row = 210, 470, 22
    height = row * len(figures) + 30
    across = _scale(0.0, top, left, right)
    parts = []
    for i in range(5):
        at = across(top * i / 4)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="6" y2="{height - 22}" stroke="#ddd"/>')
        parts.append(_text(at, height - 8, f"{top * i / 4:.3g}", "middle"))
    for number, (name, figure) in enumerate(figures.items()):
        y, value, interval = 18 + row * number, figure["value"], figure.get("interval")
        parts.append(_text(left - 8, y + 4, name, "end"))
        if isinstance(interval, list):
            ends = [across(min(max(end, 0.0), top)) for end in interval]
            parts.append(
                f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y}" y2="{y}" stroke="#1f77b4" stroke-width="4"/>'
            )
        if isinstance(value, float):
            parts.append(f'<circle cx="{across(min(max(value, 0.0), top)):.1f}" cy="{y}" r="4" fill="#0b3d66"/>')
    return _svg(right + 20, height, parts)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _frame(label: str) -> str:
    axis = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}" stroke="#444"/>'
    return axis + _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, label, "middle")


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="11">{escape(text)}</text>'


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">{"".join(parts)}</svg>'
