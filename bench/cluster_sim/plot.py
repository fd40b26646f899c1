"""The rows as a picture: bars, one below the other, as SVG without a library."""

import math
from collections.abc import Mapping
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
