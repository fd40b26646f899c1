"""Rows as pictures, bars below each other or lines, as SVG without a library."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

BAR, GAP, LEFT, WIDTH = 18, 8, 120, 420
PANELS = (
    ("first_token_p99_ms", "first token, 99th percentile (ms, logarithmic)", True),
    ("hit_rate", "requests that find their adapter in memory", False),
    ("fetched_mb_per_request", "read from files for each request (MB)", False),
)


def write_plot(path: Path, rows: Mapping[str, Mapping[str, float]]) -> None:
    """One panel for each of `PANELS`, one bar for each router."""
    height = len(PANELS) * (len(rows) * (BAR + GAP) + 44) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 90} {height}" '
        'font-family="sans-serif" font-size="12" role="img">',
        f'<rect width="{LEFT + WIDTH + 90}" height="{height}" fill="white"/>',
    ]
    top = 24
    for field, title, logarithmic in PANELS:
        parts.append(f'<text x="{LEFT}" y="{top}" font-weight="bold">{escape(title)}</text>')
        top += 10
        values = [row[field] for row in rows.values()]
        for (name, row), width in zip(rows.items(), _widths(values, logarithmic), strict=True):
            fill = "#2463a8" if name == "adapter-aware" else "#9aa5b1"
            middle = top + BAR - 5
            parts.append(f'<text x="{LEFT - 6}" y="{middle}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect x="{LEFT}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{fill}"/>')
            parts.append(f'<text x="{LEFT + width + 5:.1f}" y="{middle}">{_shown(field, row[field])}</text>')
            top += BAR + GAP
        top += 34
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def _widths(values: list[float], logarithmic: bool) -> list[float]:
    if not logarithmic:
        return [WIDTH * value / (max(values) or 1.0) for value in values]
    low, high = math.log10(min(values)) - 0.3, math.log10(max(values))
    return [WIDTH * (math.log10(value) - low) / (high - low) for value in values]


def _shown(field: str, value: float) -> str:
    return f"{value:.1%}" if field.endswith("rate") else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def write_lines(path: Path, title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """A line for each of the series, from zero; its name stands at its last point."""
    points = [point for line in series.values() for point in line]
    low, high, most = min(x for x, _ in points), max(x for x, _ in points), max(y for _, y in points)
    height, left = 240, 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + WIDTH + 130} {height + 70}" '
        'font-family="sans-serif" font-size="12" role="img">',
        f'<rect width="{left + WIDTH + 130}" height="{height + 70}" fill="white"/>',
        f'<text x="{left}" y="20" font-weight="bold">{escape(title)}</text>',
    ]

    def place(x: float, y: float) -> tuple[float, float]:
        return left + WIDTH * (x - low) / ((high - low) or 1.0), 40 + height * (1 - y / most)

    for part in (0.0, 0.5, 1.0):
        _, y = place(low, part * most)
        parts.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#d5dae0"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{part * most:,.0f}</text>')
    parts += [
        f'<text x="{place(x, 0)[0]:.1f}" y="{height + 60}" text-anchor="middle">{x:g}</text>'
        for x in sorted({x for x, _ in points})
    ]
    for name, line in series.items():
        stroke = "#2463a8" if name == "adapter-aware" else "#9aa5b1"
        way = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{stroke}" stroke-width="2"/>')
        end = place(*line[-1])
        parts.append(f'<text x="{end[0] + 6:.1f}" y="{end[1] + 4:.1f}">{escape(name)}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")
