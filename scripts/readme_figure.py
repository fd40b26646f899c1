"""Draws the figures of README and docs/benchmarks.md from committed numbers: output tokens a second and milliseconds
of a decode step, of three engines, over what adapters ask.

python -m scripts.readme_figure          writes docs/images/throughput.svg and decode.svg
python -m scripts.readme_figure --check  exit code 1 if one of the files is another one
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
OURS, PEERS = RESULTS / "2026-11-26-h200-all-rows.json", RESULTS / "2026-11-22-h200-peers.json"
IMAGES = ROOT / "docs" / "images"
THROUGHPUT = {
    "LoRA unused": "no adapter",
    "one rank-16 adapter": "one adapter",
    "64 distinct rank-16": "64 adapters",
    "64 distinct, ranks 8/16/32/64": "64 of mixed ranks",
    "64 distinct rank-16, --lora-device-bytes of 8": "64, room for 8",
}
DECODE = {
    "batch 1, LoRA unused": ("LoRA unused, 1", "1 row, no adapter"),
    "batch 1, 1 distinct rank-16": ("1 distinct rank-16", "1 adapter"),
    "batch 8, 8 distinct rank-16": ("8 distinct rank-16", "8 adapters"),
    "batch 32, 32 distinct rank-16": ("32 distinct rank-16", "32 adapters"),
    "batch 64, 64 distinct rank-16": ("64 distinct rank-16", "64 adapters"),
    "batch 64, 64 distinct, ranks 8/16/32/64": ("64 distinct, ranks 8/16/32/64", "64 of mixed ranks"),
}
"""Rows of ours, and by what names the peers' and the figure have them."""
COLORS = {"limit": "#7fb58a", "multilora": "#2f6fdb", "sglang": "#d9822b", "vllm": "#8a8f98"}
NAMES = {"limit": "limit", "multilora": "multilora", "sglang": "SGLang 0.5.17", "vllm": "vLLM 0.26.0"}
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 760, 330, 56, 60, 42
PEERS_SHOWN = ("sglang", "vllm")
Numbers = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Figure:
    """Groups of bars: label → engine → value. most: where the axis ends; digits: of the numbers above the bars."""

    file: Path
    title: str
    numbers: Numbers
    most: int
    step: int
    digits: int

    def svg(self) -> str:
        """The bars, each with its number; one that is higher than the axis is cut there."""
        parts = [_text(LEFT, 20, self.title, bold=True), *self._legend(), *self._axis()]
        step = (WIDTH - 10 - LEFT) / len(self.numbers)
        for i, (label, values) in enumerate(self.numbers.items()):
            left, width = LEFT + i * step + 12, (step - 24) / len(values)
            for j, (engine, value) in enumerate(values.items()):
                parts += self._bar(left + j * width, width, engine, value)
            parts.append(_text(left + width * len(values) / 2, HEIGHT - 18, label, anchor="middle"))
        style = "text{font:11px system-ui,sans-serif;fill:#333}@media(prefers-color-scheme:dark){text{fill:#ccc}}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
            f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(self.title)}</title>'
            f"<style>{style}</style>{''.join(parts)}</svg>\n"
        )

    def _legend(self) -> Iterator[str]:
        for i, engine in enumerate(next(iter(self.numbers.values()))):
            x = LEFT + 130 * i
            yield f'<rect x="{x}" y="32" width="11" height="11" fill="{COLORS[engine]}"/>'
            yield _text(x + 16, 42, NAMES[engine])

    def _axis(self) -> Iterator[str]:
        for value in range(0, self.most + 1, self.step):
            y = self._y(value)
            yield f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#999" opacity=".3"/>'
            yield _text(LEFT - 6, y + 4, f"{value:,}", anchor="end")

    def _bar(self, x: float, width: float, engine: str, value: float) -> list[str]:
        y = self._y(min(value, self.most))
        size = f'width="{width - 3:.1f}" height="{self._y(0) - y:.1f}"'
        return [
            f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{COLORS[engine]}"/>',
            _text(x + width / 2 - 1.5, y - 4, f"{value:.{self.digits}f}", anchor="middle"),
        ]

    def _y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.most * (HEIGHT - TOP - BOTTOM)


def throughput() -> Figure:
    """Output tokens a second."""
    rows = {row["row"]: row["value"] for row in json.loads(OURS.read_text())["rows"]}
    peers = json.loads(PEERS.read_text())["throughput"]
    numbers = {
        label: {"multilora": rows[f"throughput, {row}"], **{engine: peers[row][engine] for engine in PEERS_SHOWN}}
        for row, label in THROUGHPUT.items()
    }
    title = "Output tokens a second, one H200, Llama-3.1-8B's dimensions"
    return Figure(IMAGES / "throughput.svg", title, numbers, most=6000, step=1000, digits=0)


def decode() -> Figure:
    """Milliseconds of a decode step, the bandwidth's limit first."""
    rows = {row["row"]: row for row in json.loads(OURS.read_text())["rows"]}
    peers = json.loads(PEERS.read_text())["decode"]
    numbers = {}
    for row, (theirs, label) in DECODE.items():
        ours = rows[f"decode, {row}"]
        both = {engine: peers[theirs][engine] for engine in PEERS_SHOWN}
        numbers[label] = {"limit": ours["limit"], "multilora": ours["value"], **both}
    title = "Milliseconds of a decode step, 128 tokens in, one H200, Llama-3.1-8B's dimensions (bars end at 20)"
    return Figure(IMAGES / "decode.svg", title, numbers, most=20, step=5, digits=1)


FIGURES = (throughput, decode)


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def main() -> int:
    """Write or check. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    figures = [make() for make in FIGURES]
    if parser.parse_args().check:
        return int(any(not one.file.exists() or one.file.read_text() != one.svg() for one in figures))
    for one in figures:
        one.file.write_text(one.svg())
        sys.stdout.write(f"wrote {one.file.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
