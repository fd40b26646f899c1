"""What `mkdocs.yml` does to the pages, which are written to be read in the repository too.

Links to files outside of docs/ become their names, and must exist; marks in cookbook.md become the examples' code. A
page that would load anything from another host ends the build.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
EXAMPLE = re.compile(r"^<!-- example: (\S+) -->$", re.M)
EXTERNAL = re.compile(
    r"""<(?:script|img|iframe)[^>]+src=["']?(?:https?:)?//|<link[^>]+rel=["']?(?:stylesheet|preconnect|icon)["']?[^>]+href=["']?(?:https?:)?//"""
)


class SiteError(Exception):
    """The site cannot be built as it is."""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""

    def name(found: re.Match[str]) -> str:
        text, path = found[1], found[2]
        if not (ROOT / path).exists():
            raise SiteError(f"{page.file.src_uri}: ../{path} does not exist")
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    def code(found: re.Match[str]) -> str:
        return f"```python\n{(ROOT / 'examples' / found[1]).read_text().rstrip()}\n```"

    return EXAMPLE.sub(code, OUTSIDE.sub(name, markdown))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the page's HTML."""
    if found := EXTERNAL.search(output):
        raise SiteError(f"{page.file.src_uri}: it would load something from elsewhere: {found[0]}")
    return output
