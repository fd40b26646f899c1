"""The console in a real Chromium, against the real server on the bundled model (`make test-console`).

The browser is the first of chromium, chromium-browser and google-chrome in PATH, or what MULTILORA_CHROMIUM names.
With MULTILORA_SCREENSHOTS=DIR the pictures that docs/console.md shows are written there.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from running_server import ANSWERS, PATHS, Server, serving

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 120_000  # milliseconds, on a machine that many share
NAMELESS = """[...document.querySelectorAll("button, input, select, textarea")].filter(e => e.checkVisibility()
    && !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.outerHTML)"""
"""What a screen reader could not name."""
COLUMN = "article[data-adapter='{}'] .text"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("MULTILORA_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    assert path, f"no browser: install Debian's chromium, or name one in MULTILORA_CHROMIUM (looked for {NAMES})"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    paths = [f"{name}={PATHS[name]}" for name in ("pirate", "sql")]
    with serving(tmp_path_factory, "--lora-paths", *paths) as running:
        yield running


class Page:
    """A page of the console, and what went wrong in it: errors of scripts, and requests to anywhere else."""

    def __init__(self, browser, server, path="/", **options):
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, **options)
        self.page.set_default_timeout(SECONDS)
        self.problems = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda r: r.url.startswith(server.url) or self.problems.append(r.url))
        self.page.on("console", lambda m: m.type == "error" and self.problems.append(m.text))
        self.page.goto(server.url + path)

    def __enter__(self):
        return self.page

    def __exit__(self, kind, error, trace):
        self.page.close()
        refused = [p for p in self.problems if not re.search("status of (400|401|503)|ERR_CONNECTION|data:image", p)]
        assert kind is not None or refused == []


def shot(page, name):
    """The picture `name`, from the top of the page."""
    if folder := os.environ.get("MULTILORA_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"console-{name}.png"), full_page=name == "light")


def badge(page, text):
    page.wait_for_function("text => document.getElementById('engine').textContent === text", arg=text)


def answers(page, *names):
    page.click("#run")
    page.wait_for_function("() => document.getElementById('total').textContent.includes('tokens/s')")
    return {name: page.inner_text(COLUMN.format(name or "")).strip() for name in names}


def load(page, name, path):
    page.click("#load-button")
    page.fill("#load-name", name)
    page.fill("#load-path", path)
    page.click("#load-dialog .primary")


def test_load_ask_side_by_side_swap_compose_and_unload(browser, server):
    with Page(browser, server, color_scheme="light") as page:
        badge(page, "running")
        names = (None, "pirate", "sql")
        assert answers(page, *names) == {name: ANSWERS[name] for name in names}
        assert page.inner_text("#total").endswith("tokens/s")
        load(page, "guest", "/no/such/directory")
        page.wait_for_selector("#load-dialog .error:has-text('/no/such/directory')")
        page.click("#load-dialog .close")
        load(page, "guest", PATHS["french"])
        page.wait_for_selector("tr[data-name=guest]")
        page.check("#targets input[value=guest]")
        assert answers(page, "guest") == {"guest": ANSWERS["french"]}
        page.check("input[value=probability]")
        assert page.locator("article[data-adapter=guest] .tok").count() > 5
        shot(page, "light")
        page.check("input[value=difference]")
        assert page.locator("article[data-adapter=guest] ins").count() >= 1
        assert page.locator("article[data-adapter=''] ins").count() == 0
        page.click("tr[data-name=guest] button:has-text('Swap')")
        page.fill("#load-path", PATHS["json"])
        page.click("#load-dialog .primary")
        page.wait_for_function(
            "path => document.querySelector('tr[data-name=guest]').innerText.includes(path)", arg=PATHS["json"]
        )
        page.check("input[value=plain]")
        assert answers(page, "guest") == {"guest": ANSWERS["json"]}
        page.click("#compose-button")
        page.fill("#load-name", "mix")
        page.fill("#load-path", "0.7*pirate + sql")
        page.click("#load-dialog .primary")
        page.wait_for_selector("tr[data-name=mix] .composition")
        assert "0.7 * pirate + sql" in page.inner_text("tr[data-name=mix]")
        for name in ("mix", "guest"):
            page.click(f"tr[data-name={name}] button:has-text('Unload')")
            page.wait_for_selector(f"tr[data-name={name}]", state="detached")


def test_pin_filter_and_keyboard(browser, server):
    with Page(browser, server, "/console", color_scheme="dark") as page:
        badge(page, "running")
        assert page.evaluate("document.documentElement.classList.contains('dark')")
        page.wait_for_selector("tr[data-name=sql]")
        page.click("tr[data-name=sql] button:has-text('Pin')")
        page.wait_for_selector("tr[data-name=sql] button:has-text('Unpin')")
        page.click("tr[data-name=sql] button:has-text('Unpin')")
        page.fill("#filter", "pir")
        page.wait_for_selector("tr[data-name=sql]", state="detached")
        page.fill("#filter", "")
        page.focus("#prompt")
        page.keyboard.press("Control+Enter")
        page.wait_for_function("() => document.getElementById('total').textContent.includes('tokens/s')")
        shot(page, "dark")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.name") == "form"
        assert page.evaluate(NAMELESS) == []


def test_a_killed_engine_is_said_and_its_return_too(browser, server):
    with Page(browser, server) as page:
        badge(page, "running")
        engine = next(
            p for p in psutil.Process(server.process.pid).children() if "engine.process.worker" in str(p.cmdline())
        )
        engine.kill()
        badge(page, "restarting")
        assert "being started again" in page.inner_text("#notice")
        shot(page, "restarting")
        badge(page, "running")
        assert page.is_hidden("#notice")
        assert answers(page, "pirate") == {"pirate": ANSWERS["pirate"]}


def test_a_server_with_keys_asks_for_one_and_offers_what_it_may(browser, tmp_path_factory):
    flags = ("--api-key", "user-key", "--admin-api-key", "admin-key", "--lora-paths", f"sql={PATHS['sql']}")
    with serving(tmp_path_factory, *flags) as server, Page(browser, server) as page:
        page.wait_for_selector("#key-dialog", state="visible")  # by itself, at the first refusal
        for key, may_load in (("wrong", None), ("user-key", False), ("admin-key", True)):
            if page.is_hidden("#key-dialog"):
                page.click("#key-button")
            page.fill("#key", key)
            page.click("#key-dialog button[value=save]")
            badge(page, "key needed" if may_load is None else "running")
            if may_load is not None:
                page.wait_for_selector("tr[data-name=sql]")
                page.wait_for_selector("#load-button", state="visible" if may_load else "hidden")
        page.wait_for_function("() => document.getElementById('log').childElementCount > 0")
        assert answers(page, "sql") == {"sql": ANSWERS["sql"]}
