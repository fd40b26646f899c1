"""The site's hooks and its map of pages; `make docs` builds it, in an environment of its own."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from multilora.cli import parser as cli
from scripts.site_hooks import SiteError, on_page_markdown, on_post_page

ROOT = Path(__file__).parents[2]
PAGE = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))


def test_every_page_is_in_the_map():
    named = set(re.findall(r"([a-z_]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_links_out_of_the_docs_become_names():
    assert on_page_markdown("see [rows](../bench/results)", PAGE) == "see rows (`bench/results`)"
    assert on_page_markdown("[`README.md`](../README.md#x) [a](b.md)", PAGE) == "`README.md` [a](b.md)"
    with pytest.raises(SiteError, match=r"\.\./nowhere does not exist"):
        on_page_markdown("[x](../nowhere)", PAGE)


def test_examples_are_shown():
    assert "```python" in on_page_markdown("<!-- example: chat.py -->", PAGE)
    with pytest.raises(FileNotFoundError):
        on_page_markdown("<!-- example: nothing.py -->", PAGE)


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://unpkg.com/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<img alt="a" src="http://example.org/a.png">',
    ],
)
def test_nothing_from_elsewhere(html):
    with pytest.raises(SiteError, match="from elsewhere"):
        on_post_page(html, PAGE)
    own = '<script src="assets/x.js"></script><a href="https://example.org">x</a>'
    assert on_post_page(own, PAGE) == own


def test_flags_by_purpose_exist():
    named = set(re.findall(r"`(--[a-z-]+)`", (ROOT / "docs" / "flags.md").read_text()))
    assert named <= set(cli.flags()) and len(named) > 60


def test_flags_that_others_become_exist():
    """The right columns of the tables of migrating.md."""
    for line in (ROOT / "docs" / "migrating.md").read_text().splitlines():
        cells = line.split("|")
        if len(cells) == 4:
            for flag in re.findall(r"`(--[a-z-]+)", cells[2]):
                assert flag in cli.flags(), line
