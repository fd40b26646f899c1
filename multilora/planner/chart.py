"""Line charts as SVG, readable on light and dark pages. It knows axes and colours, and nothing of what is drawn.

Called by `plot.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 34, 44
COLORS = ("#2f6fdb", "#d9822b", "#8a5cc2", "#3a9a5b")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.axis{stroke:#999}.grid{stroke:#999;stroke-opacity:.25}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}}"
)


@dataclass(frozen=True)
class Line:
    """One line. points: (x, y); dashed: such as a limit."""

    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart. log_x: the x axis counts powers of two; mark: an x where a vertical line stands, with its words."""

    title: str
    x_label: str
    lines: Sequence[Line]
    log_x: bool = False
    mark: tuple[float, str] | None = None


def svg(charts: Sequence[Chart]) -> str:
    """All charts, one below the other."""
    body = "".join(_drawn(chart, i * HEIGHT) for i, chart in enumerate(charts))
    height = HEIGHT * len(charts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img"><title>{escape(charts[0].title)}</title>'
        f"<style>{STYLE}</style>{body}</svg>\n"
    )


def ticks(largest: float) -> list[float]:
    """Round numbers from 0 up to `largest`, three to seven of them."""
    if largest <= 0:
        return [0.0, 1.0]
    unit = 10 ** math.floor(math.log10(largest))
    step = next(s * unit for s in (0.2, 0.25, 0.5, 1, 2) if largest / (s * unit) <= 6)
    return [step * i for i in range(math.ceil(largest / step * (1 - 1e-9)) + 1)]


class _Scales:
    """From values to places in the picture."""

    def __init__(self, chart: Chart, top: float):
        xs = [x for line in chart.lines for x, _ in line.points]
        self.log = chart.log_x
        self.y_ticks = ticks(max((y for line in chart.lines for _, y in line.points), default=1.0))
        self.x_ticks = sorted(set(xs)) if self.log else ticks(max(xs, default=1.0))
        self._first, self._last = self._place(self.x_ticks[0]), self._place(self.x_ticks[-1])
        self._top = top

    def x(self, value: float) -> float:
        share = (self._place(value) - self._first) / ((self._last - self._first) or 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = value / self.y_ticks[-1]
        return self._top + HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def _place(self, value: float) -> float:
        return math.log2(value) if self.log else value


def _drawn(chart: Chart, top: float) -> str:
    scales = _Scales(chart, top)
    bottom, right = scales.y(0), WIDTH - RIGHT
    parts = [
        _text(LEFT, top + 18, chart.title, weight="bold"),
        _text(right, bottom + 36, chart.x_label, anchor="end"),
    ]
    for value in scales.y_ticks:
        y = scales.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value:,.6g}", anchor="end"))
    parts += [_text(scales.x(value), bottom + 18, f"{value:,.6g}", anchor="middle") for value in scales.x_ticks]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>')
    if chart.mark is not None:
        x = scales.x(chart.mark[0])
        parts.append(
            f'<line class="axis" stroke-dasharray="4 3" x1="{x:.1f}" x2="{x:.1f}" y1="{top + TOP}" '
            f'y2="{bottom:.1f}"/>'
        )
        parts.append(_text(x - 4, bottom - 8, chart.mark[1], anchor="end"))
    return "".join([*parts, *_lines(chart, scales)])


def _lines(chart: Chart, scales: _Scales) -> list[str]:
    """Each with its name at its right end; names do not lie on each other."""
    parts, taken = [], [-math.inf]
    order = sorted(range(len(chart.lines)), key=lambda i: scales.y(chart.lines[i].points[-1][1]))
    for i in order:
        line, color = chart.lines[i], COLORS[i % len(COLORS)]
        points = " ".join(f"{scales.x(x):.1f},{scales.y(y):.1f}" for x, y in line.points)
        dashes = ' stroke-dasharray="6 4"' if line.dashed else ""
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2"{dashes} points="{points}"/>')
        parts += [
            f'<circle fill="{color}" r="3" cx="{scales.x(x):.1f}" cy="{scales.y(y):.1f}"/>'
            for x, y in line.points
            if not line.dashed
        ]
        y = max(scales.y(line.points[-1][1]) + 4, taken[-1] + 15)
        taken.append(y)
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{y:.1f}" style="fill:{color}">{escape(line.label)}</text>')
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
