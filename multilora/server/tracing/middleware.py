"""ASGI middleware that opens the span of each HTTP request, below the client's if it sends a W3C `traceparent`.

What the request starts finds the span in `tracing.CURRENT`. Probes and scrapes are not traced. A route counts by its
template, so that no text of a client becomes a name.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from multilora.server.metrics.http import METHODS, UNCOUNTED
from multilora.server.tracing.exporter import SpanExporter
from multilora.tracing import CURRENT, Parent, TraceSpan, parse_traceparent

HEADER = b"traceparent"
PROCESS = "front"


class TraceRequests:
    """Middleware that has `exporter` send a span for each request that is traced."""

    def __init__(self, app: ASGIApp, exporter: SpanExporter):
        self.app = app
        self._exporter = exporter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        span = self._open(scope) if scope["type"] == "http" and scope["path"] not in UNCOUNTED else None
        if span is None:
            await self.app(scope, receive, send)
            return
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        token = CURRENT.set(span)
        try:
            await self.app(scope, receive, noting)
        finally:
            CURRENT.reset(token)
            _close(span, scope, status)

    def _open(self, scope: Scope) -> TraceSpan | None:
        parent = _parent(scope)
        method = _method(scope)
        trace_id = self._exporter.trace_id(method, parent)
        if trace_id is None:
            return None
        above = "" if parent is None else parent.context.span_id
        return TraceSpan(method, PROCESS, self._exporter.export, trace_id, above, server=True)


def _close(span: TraceSpan, scope: Scope, status: int) -> None:
    route = getattr(scope.get("route"), "path", None)  # set by the router
    span.attributes["http.request.method"] = _method(scope)
    if route is not None:
        span.name = f"{span.name} {route}"
        span.attributes["http.route"] = route
    if status:
        span.attributes["http.response.status_code"] = status
    span.end(f"status {status}" if status >= 500 else "" if status else "no answer was sent")


def _method(scope: Scope) -> str:
    method: str = scope["method"]
    return method if method in METHODS else "HTTP"


def _parent(scope: Scope) -> Parent | None:
    for name, value in scope["headers"]:
        if name == HEADER:
            return parse_traceparent(value.decode("latin-1"))
    return None
