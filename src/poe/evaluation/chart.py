"""Charts of metrics with their intervals, as SVG. The same values give the same bytes, so a chart can be under test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9")  # color-blind people see them apart
INK, PALE = "#1f2937", "#d5dae3"
WIDTH, LABELS, VALUES = 760, 250, 170  # of the chart, of the names on its left, of the numbers on its right
LINE, GAP, HEAD, TICKS = 15, 9, 34, 26


@dataclass(frozen=True)
class Point:
    """A value of a series, with the bounds of its interval if it has one, and the value as text."""

    series: str
    value: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Panel:
    """A part of a chart with an axis of its own: a title, and the points of each row by the row's name."""

    title: str
    rows: Sequence[tuple[str, Sequence[Point]]]
    largest: float | None = None  # the end of the axis; None: it is chosen


def draw_chart(panels: Sequence[Panel], series: Sequence[str], label: str) -> str:
    """Return an SVG with the panels below one another. Colors tell `series` apart, and `label` describes the chart."""
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(series)}
    parts: list[str] = []
    y = 14.0
    if len(series) > 1:
        x = float(LABELS)
        for name in series:
            parts += [f'<circle cx="{x:g}" cy="{y:g}" r="4.5" fill="{colors[name]}"/>', _text(x + 9, y + 4.5, name)]
            x += 24 + 7.2 * len(name)
        y += 18
    for panel in panels:
        drawn, y = _draw_panel(panel, colors, y)
        parts += drawn
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:g}" font-family="Arial, Helvetica, '
            f'sans-serif" font-size="13" role="img" aria-label="{escape(label)}">',
            f'<rect width="{WIDTH}" height="{y:g}" fill="#ffffff"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def _draw_panel(panel: Panel, colors: dict[str, str], top: float) -> tuple[list[str], float]:
    """Return the elements of a panel, and where it ends."""
    values = [x for _, points in panel.rows for p in points for x in (p.value, p.low, p.high) if x is not None]
    step = _find_step(panel.largest or max([*values, 0.0]))
    smallest = step * math.floor(min([*values, 0.0]) / step)
    largest = panel.largest or step * math.ceil(max([*values, step]) / step)
    left, right = float(LABELS), float(WIDTH - VALUES)

    def place(value: float) -> float:
        share = (min(max(value, smallest), largest) - smallest) / (largest - smallest)
        return round(left + share * (right - left), 1)

    start = top + HEAD
    end = start + sum(LINE * max(1, len(points)) + GAP for _, points in panel.rows)
    parts = [_text(12, top + 20, panel.title, weight="bold")]
    for tick in range(round((largest - smallest) / step) + 1):
        value = smallest + tick * step
        parts.append(f'<path d="M{place(value)} {start:g}V{end:g}" stroke="{PALE}"/>')
        parts.append(_text(place(value), end + 16, f"{value:.10g}", anchor="middle", size=11))
    y = start + GAP / 2
    for name, points in panel.rows:
        height = LINE * max(1, len(points))
        parts.append(_text(LABELS - 10, y + height / 2 + 4.5, _shorten(name), anchor="end"))
        for number, point in enumerate(points):
            middle, color = y + LINE * (number + 0.5), colors[point.series]
            if point.low is not None and point.high is not None:
                ends = f"M{place(point.low)} {middle:g}H{place(point.high)}"
                parts.append(f'<path d="{ends}" stroke="{color}" stroke-width="2.5" stroke-opacity="0.55"/>')
            parts.append(f'<circle cx="{place(point.value)}" cy="{middle:g}" r="4" fill="{color}"/>')
            parts.append(_text(right + 12, middle + 4.5, point.text, size=12))
        y += height + GAP
    return parts, end + TICKS


def _find_step(largest: float) -> float:
    """Return the distance of the ticks: 1, 2 or 5 times a power of ten, with four to eight ticks."""
    if largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest / 4))
    return next(power * factor for factor in (1, 2, 5, 10) if largest / (power * factor) <= 8)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, weight: str = "normal") -> str:
    style = f' text-anchor="{anchor}"' if anchor != "start" else ""
    style += f' font-size="{size}"' if size != 13 else ""
    style += f' font-weight="{weight}"' if weight != "normal" else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{INK}"{style}>{escape(text)}</text>'


def _shorten(name: str) -> str:
    return name if len(name) <= 36 else f"{name[:35]}…"
