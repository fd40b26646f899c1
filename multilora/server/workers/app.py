"""A worker's application: the routes that generate, embed or tokenize; all others are the supervisor's to answer."""

from typing import Any

from fastapi import FastAPI
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

import multilora
from multilora.drivers.workers.link import SupervisorLink, WorkerDriver
from multilora.front.access import Caller
from multilora.front.workers.messages import TakeRequest
from multilora.server import errors
from multilora.server.anthropic import errors as anthropic_errors
from multilora.server.app import add_middleware, include_request_routes
from multilora.server.key_ring import KeyRing
from multilora.server.request_body import Bodies
from multilora.server.tracing.exporter import SpanExporter
from multilora.server.workers.events import WorkerEvents
from multilora.server.workers.relay import Forwarder


def create_worker_app(
    driver: WorkerDriver,
    sampling_defaults: dict[str, Any],
    events: WorkerEvents,
    keys: KeyRing,
    link: SupervisorLink,
    relay: str,
    traces: SpanExporter | None,
    bodies: Bodies,
) -> ASGIApp:
    """`relay`: the path of the supervisor's socket; bodies: its `state.bodies`; the other arguments are those of
    `create_app`."""
    front, config = driver.front, driver.front.config
    app = FastAPI(title="multilora", version=multilora.__version__, openapi_url=None)
    app.state.driver = driver
    app.state.bodies = bodies
    errors.install(app, dict(anthropic_errors.SHAPES))
    include_request_routes(app, driver, sampling_defaults if config.sampling_defaults == "model" else {})

    async def admit(caller: Caller) -> None:
        if caller.limits.requests_per_minute is not None:
            await link.ask(lambda call: TakeRequest(call=call, caller=caller))

    def use_tenants(file: Any) -> None:
        front.registry.tenants = file.tenants

    keys.watch(use_tenants)
    add_middleware(app, config, events, keys, admit, traces)
    return OwnRoutes(app, Forwarder(relay))


class OwnRoutes:
    """ASGI: requests for a route of `app` go there, all others to `others`."""

    def __init__(self, app: FastAPI, others: ASGIApp):
        self._app = app
        self._others = others
        self._known: set[tuple[str, str]] = set()  # method and path; no more than routes, as none has a parameter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self._app if self.owns(scope) else self._others)(scope, receive, send)

    def owns(self, scope: Scope) -> bool:
        """Whether the request is one for `app`."""
        key = scope["method"], scope["path"]
        if key not in self._known:
            if not any(route.matches(scope)[0] is Match.FULL for route in self._app.routes):
                return False
            self._known.add(key)
        return True
