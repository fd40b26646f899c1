"""HTTP requests by route, method and status class, under the names that vLLM's boards read.

ASGI middleware around the whole application. A route counts under its template (`/v1/models/{name}`), whatever has no
route under "none", so that clients cannot make labels. Probes do not count, as in vLLM.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from multilora.server.metrics.histogram import Histogram

SECONDS = (0.1, 0.5, 1.0)
UNCOUNTED = frozenset(
    {"/metrics", "/health", "/health_generate", "/ready", "/load", "/ping", "/version", "/server_info"}
)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class HttpCounts(Collector):
    """Requests counted since the server started."""

    def __init__(self) -> None:
        self._requests = Counter[tuple[str, str, str]]()  # route, status class, method
        self._seconds: dict[tuple[str, str], Histogram] = {}  # route, method

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request has been answered; `seconds` include a stream's end."""
        method = method if method in METHODS else "other"
        self._requests[route, f"{status // 100}xx", method] += 1
        if (route, method) not in self._seconds:
            self._seconds[route, method] = Histogram(SECONDS)
        self._seconds[route, method].observe(seconds)

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        labels = ["handler", "status", "method"]
        requests = CounterMetricFamily("http_requests", "HTTP requests answered", labels=labels)
        for key, number in self._requests.items():
            requests.add_metric(key, number)
        yield requests
        text = "From an HTTP request to the end of its answer"
        seconds = HistogramMetricFamily("http_request_duration_seconds", text, labels=["handler", "method"])
        for (route, method), histogram in self._seconds.items():
            histogram.add_to(seconds, (route, method), SECONDS)
        yield seconds


class RequestCounter(Protocol):
    """Who is told of each request: `HttpCounts`, or who tells them."""

    def count(self, route: str, method: str, status: int, seconds: float) -> None: ...


class CountRequests:
    """Middleware that tells `counts` of each request."""

    def __init__(self, app: ASGIApp, counts: RequestCounter):
        self.app = app
        self.counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNCOUNTED:
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 500  # where the application raises, an outer layer answers so

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "none")  # set by the router
            self.counts.count(route, scope["method"], status, time.perf_counter() - start)
