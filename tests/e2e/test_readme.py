"""README and docs: commands that the command line understands, links that lead somewhere, the figure from its
numbers.

The examples themselves run in `test_documentation.py`, `multilora demo` and `tests/examples`.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from multilora.cli import parser as cli
from multilora.errors import ConfigError
from scripts import readme_figure

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:^ {4}|^```sh\n|^|`)(multilora [a-z][^`\n]*)", re.M)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)


def commands() -> list[tuple[str, str]]:
    """(page, command line): each in one line, without its comment."""
    found = []
    for page in PAGES:
        for line in COMMAND.findall(page.read_text()):
            line = re.sub(r"\s+#\s.*$|\s{8,}.*$", "", line).strip().rstrip("\\")
            found.append((page.name, line))
    return found


def typed(line: str) -> list[str]:
    """What a person would type: without words of the documentation's own."""
    line = re.sub(r"\[[A-Z]+\]|…|\$\([^)]*\)", "", line)
    return shlex.split(line)[1:]


WHOLE = [
    (page, line) for page, line in commands() if "|" not in line and not re.fullmatch(r"multilora [a-z ]+", line)
]


@pytest.mark.parametrize(("page", "line"), WHOLE)
def test_a_command_can_be_typed(page, line):
    """What it names need not exist, but flags and their number of values must."""
    argv = typed(line)
    if argv[0] == "keys":
        argv = [word if word != "<" else "FILE" for word in argv]
    if {"--help", "--version"} & set(argv):
        return
    try:
        cli.parse(argv)
    except ConfigError as e:
        pytest.fail(f"{page}: {line}: {e.message}")


def test_there_are_commands():
    assert len(WHOLE) > 25


def test_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = {name for page in PAGES for name in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", page.read_text(), re.M)}
    assert named <= targets and {"demo", "test", "serve"} <= named


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, part = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if part and target.suffix == ".md":
            assert part in {anchor(heading) for heading in HEADING.findall(target.read_text())}, link


def test_the_figures_are_drawn_from_the_numbers():
    throughput, decode = (make() for make in readme_figure.FIGURES)
    for one in (throughput, decode):
        assert one.file.read_text() == one.svg()
    assert throughput.numbers["64 adapters"] == {"multilora": 4514.3768, "sglang": 3153, "vllm": 1614}
    assert decode.numbers["64 adapters"] == {"limit": 4.9489, "multilora": 7.3214, "sglang": 12.2, "vllm": 33.3}


def test_the_best_peer_of_a_row_is_the_better_of_both():
    rows = {row["row"]: row for row in json.loads(readme_figure.OURS.read_text())["rows"]}
    for name, peers in json.loads(readme_figure.PEERS.read_text())["throughput"].items():
        if name != "unit":
            assert rows[f"throughput, {name}"]["best_peer"] == max(peers.values()), name


def test_every_tick_links_to_tests():
    table = (ROOT / "README.md").read_text().partition("## What it can, and others")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ") and "✔" in line]
    assert len(rows) >= 12 and all(re.search(r"\[✔\]\(tests/[^)]+\.py\)", row[1]) for row in rows)
    explained = (ROOT / "docs" / "comparison.md").read_text()
    assert "0.5.23" in explained and "0.33.0" in explained
