"""A line chart as SVG text, without a plotting library."""

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 44, 44
COLOURS = ("#1f6feb", "#d1242f", "#2da44e", "#8250df")


def line_chart(title: str, x_label: str, series: dict[str, Sequence[tuple[float, float]]]) -> str:
    """One line for each of `series`, name → (x, y) points with y between 0 and 1."""
    xs = [x for points in series.values() for x, _ in points]
    low, high = min(xs), max(xs)
    span = (high - low) or 1.0

    def at(x: float, y: float) -> str:
        across = LEFT + (x - low) / span * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>',
    ]
    for tenths in range(0, 11, 2):
        y = at(low, tenths / 10).partition(",")[2]
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>',
            f'<text x="{LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{tenths / 10:.1f}</text>',
        ]
    for tick in range(5):
        value = low + span * tick / 4
        x = at(value, 0).partition(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{WIDTH // 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        line = " ".join(at(x, y) for x, y in points)
        parts += [
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{LEFT + 190 * index}" y="38" fill="{colour}">{escape(name)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])
