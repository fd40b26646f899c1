"""docs/api.md as a whole against the code: flags with their defaults, routes, and statuses of errors."""

import re
from pathlib import Path

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer

from multilora import errors
from multilora.cli import parser as cli
from multilora.cli.compat import ALWAYS_ON, IGNORED, REFUSED
from multilora.config import Config
from multilora.options import options_of, parse_size

TEXT = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
NO_ROUTES = {"/dev/shm", "/v1", "/v1/traces"}
"""What looks like a route in the text and is none."""
OF_OTHER_COMMANDS = {"--json", "--check"}
"""Flags in the text that are not those of `multilora serve`."""


def section(heading: str) -> str:
    return TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def rows(heading: str) -> list[list[str]]:
    """The cells of the section's table, without its head."""
    found = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found[2:]]


def default(option) -> str:
    """What the table says."""
    if option.type is bool:
        return "on" if option.default else "off"
    return "none" if option.default in (None, ()) else f"`{option.default}`"


FLAGS = {row[0]: row[1] for row in rows("Flags")}


@pytest.mark.parametrize("option", options_of(Config), ids=lambda option: option.flag)
def test_every_flag_is_listed_with_its_default(option):
    names = ", ".join(f"`{flag}`" for flag in (option.flag, *option.aliases))
    assert names in FLAGS, f"no row for {names} in the table of docs/api.md, ## Flags"
    said = FLAGS[names]
    if option.size and said != "none":
        said = f"`{parse_size(said.strip('`'))}`"
    assert said == default(option), f"docs/api.md has another default of {option.flag}"


def test_no_other_flag_is_named():
    ours = set(cli.flags())
    assert {flag for row in FLAGS for flag in re.findall(r"--[a-z-]+", row)} == ours
    known = ours | {f"--no-{flag[2:]}" for flag in ours} | set(IGNORED) | set(REFUSED) | set(ALWAYS_ON) | {"--help"}
    known |= OF_OTHER_COMMANDS
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-])", TEXT)) - known == set()


def served() -> set[str]:
    app = LocalServer(FakeEngineClient(), None).app
    return {re.sub(r"\{(\w+)(:path)?\}", r"{\1}", path) for path in app.openapi()["paths"]}


def documented() -> set[str]:
    """Paths in backticks, behind methods and before queries and bodies; not those that are said to be missing."""
    spans = re.findall(r"`((?:GET|POST|DELETE|HEAD)? ?/[^`]*)`", TEXT.replace(section("Deviations"), ""))
    return {re.split(r"[ ?]", span.split(" ", 1)[1] if span[0] != "/" else span)[0] for span in spans}


def test_every_route_is_documented_and_every_documented_route_is_served():
    below_v1 = {f"/v1{path}" for path in ("/tokenize", "/detokenize")}  # "also below /v1"
    named = {re.sub(r"\{\w+\}", "{}", path) for path in documented() | below_v1}
    routes = {re.sub(r"\{\w+\}", "{}", path) for path in served()}
    assert routes - named == set()
    assert named - routes == NO_ROUTES


def test_every_status_of_an_error_is_listed():
    found = {cls.status for name, cls in vars(errors).items() if isinstance(cls, type) and hasattr(cls, "status")}
    assert found == {int(row[0]) for row in rows("Errors")}
