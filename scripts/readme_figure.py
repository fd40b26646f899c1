"""Draws the README's figure from committed numbers: output tokens a second of three engines over what adapters ask.

python -m scripts.readme_figure          writes docs/images/throughput.svg
python -m scripts.readme_figure --check  exit code 1 if the file is another one
"""

import argparse
import json
import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
OURS, PEERS = RESULTS / "2026-11-26-h200-all-rows.json", RESULTS / "2026-11-22-h200-peers.json"
FIGURE = ROOT / "docs" / "images" / "throughput.svg"
ROWS = {
    "LoRA unused": "no adapter",
    "one rank-16 adapter": "one adapter",
    "64 distinct rank-16": "64 adapters",
    "64 distinct, ranks 8/16/32/64": "64 of mixed ranks",
    "64 distinct rank-16, --lora-device-bytes of 8": "64, room for 8",
}
ENGINES = {"multilora": "#2f6fdb", "sglang": "#d9822b", "vllm": "#8a8f98"}
NAMES = {"multilora": "multilora", "sglang": "SGLang 0.5.17", "vllm": "vLLM 0.26.0"}
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, MOST = 760, 330, 56, 60, 42, 6000


def numbers() -> dict[str, dict[str, float]]:
    """Label → engine → tokens a second."""
    rows = {row["row"]: row["value"] for row in json.loads(OURS.read_text())["rows"]}
    peers = json.loads(PEERS.read_text())["throughput"]
    return {label: {"multilora": rows[f"throughput, {row}"], **peers[row]} for row, label in ROWS.items()}


def figure() -> str:
    """The SVG: groups of bars, each with its number."""
    parts = [_text(LEFT, 20, "Output tokens a second, one H200, Llama-3.1-8B's dimensions", bold=True)]
    x = LEFT
    for engine, color in ENGINES.items():
        parts.append(f'<rect x="{x}" y="32" width="11" height="11" fill="{color}"/>')
        parts.append(_text(x + 16, 42, NAMES[engine]))
        x += 130
    for value in range(0, MOST + 1, 1000):
        y = _y(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#999" opacity=".3"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value:,}", anchor="end"))
    step = (WIDTH - 10 - LEFT) / len(ROWS)
    for i, (label, values) in enumerate(numbers().items()):
        left, width = LEFT + i * step + 12, (step - 24) / len(ENGINES)
        for j, (engine, color) in enumerate(ENGINES.items()):
            y = _y(values[engine])
            at = left + j * width
            parts.append(
                f'<rect x="{at:.1f}" y="{y:.1f}" width="{width - 3:.1f}" height="{_y(0) - y:.1f}" fill="{color}"/>'
            )
            parts.append(_text(at + width / 2 - 1.5, y - 4, f"{values[engine]:.0f}", anchor="middle"))
        parts.append(_text(left + width * len(ENGINES) / 2, HEIGHT - 18, label, anchor="middle"))
    style = "text{font:11px system-ui,sans-serif;fill:#333}@media(prefers-color-scheme:dark){text{fill:#ccc}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img"><title>Throughput of three engines over adapters</title><style>{style}</style>{"".join(parts)}'
        "</svg>\n"
    )


def _y(value: float) -> float:
    return HEIGHT - BOTTOM - value / MOST * (HEIGHT - TOP - BOTTOM)


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def main() -> int:
    """Write or check. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    if parser.parse_args().check:
        return int(not FIGURE.exists() or FIGURE.read_text() != figure())
    FIGURE.write_text(figure())
    sys.stdout.write(f"wrote {FIGURE.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
