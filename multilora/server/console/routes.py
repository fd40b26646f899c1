"""`/console`: the page, its parts, and what it asks for once a second. Called by `app.py`."""

from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse

from multilora import logs
from multilora.drivers.async_driver import AsyncDriver
from multilora.server.console.state import console_state
from multilora.server.metrics.totals import Totals
from multilora.server.streaming import Json
from multilora.server.strict_route import StrictRoute

PAGE = Path(__file__).resolve().parent / "page"
PARTS = {"console.css": "text/css", "console.js": "text/javascript", "charts.js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the page: nothing from elsewhere, and no script that isn't one of its parts."""


def page_response() -> Response:
    """The page itself, which holds nothing of this server: all that it shows comes from routes that ask for a key."""
    return _part("index.html", "text/html")


def router(driver: AsyncDriver, totals: Totals) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.get("/console", response_class=HTMLResponse)
    async def page() -> Response:
        """A page for people."""
        return page_response()

    @routes.get("/console/console.css", include_in_schema=False)
    async def style() -> Response:
        """Its style."""
        return _part("console.css", PARTS["console.css"])

    @routes.get("/console/console.js", include_in_schema=False)
    async def script() -> Response:
        """Its script."""
        return _part("console.js", PARTS["console.js"])

    @routes.get("/console/charts.js", include_in_schema=False)
    async def charts() -> Response:
        """The part of the script that draws."""
        return _part("charts.js", PARTS["charts.js"])

    @routes.get("/console/state")
    async def state() -> Response:
        """Model, memory, adapters, load and queues, as far as the key may see them."""
        return Json(console_state(driver, totals))

    @routes.get("/console/log")
    async def log(after: int = 0) -> Response:
        """The last lines of the front's log whose number is over `after`."""
        return Json({"lines": logs.RECENT.after(after)})

    return routes


def _part(name: str, media_type: str) -> Response:
    return Response(
        (PAGE / name).read_bytes(),
        media_type=media_type,
        headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"},
    )
