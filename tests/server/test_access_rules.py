"""The table of routes: none is missing, none too many, and the page shows the same."""

from pathlib import Path

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer

from multilora.server.access_rules import RULES, Need, rule_of

PAGE = Path(__file__).parents[2] / "docs" / "security.md"


def declared(routes):
    for route in routes:
        if hasattr(route, "original_router"):
            yield from declared(route.original_router.routes)
        else:
            yield route.path


def test_every_route_has_a_line():
    paths = set(declared(LocalServer(FakeEngineClient(), None).app.routes))
    assert len(paths) > 50
    assert set(RULES) == paths


@pytest.mark.parametrize(
    ("path", "need"),
    [
        ("/health", Need.NOTHING),
        ("/health/", Need.NOTHING),
        ("//health", Need.KEY),
        ("/flush_cache", Need.ADMIN),
        ("/flush_cache/", Need.ADMIN),
        ("/flush_cache//", Need.ADMIN),
        ("/v1/models/org/adapter", Need.KEY),
        ("/v1/responses/resp_1/cancel", Need.KEY),
        ("/metrics/", Need.SCRAPE),
        ("/nope", Need.KEY),
        ("", Need.NOTHING),
    ],
)
def test_the_rule_of_a_path(path, need):
    assert rule_of(path).need is need


def test_the_page_shows_the_table():
    rows = [f"| `{path}` | {rule.need.value}{'; POST only' * rule.post_only} |" for path, rule in RULES.items()]
    shown = [line for line in PAGE.read_text().splitlines() if line.startswith("| `/")]
    assert shown == rows
