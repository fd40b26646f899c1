"""The HTTP part of traces, and what becomes of spans that a collector does not take.

Covers `tracing/exporter.py`, `tracing/middleware.py` too.
"""

import asyncio
import logging
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from otlp import Collector, path_of

from multilora.config import Config
from multilora.errors import ConfigError
from multilora.server.tracing import exporter as module
from multilora.server.tracing.exporter import QUEUE, SpanExporter
from multilora.server.tracing.middleware import TraceRequests
from multilora.tracing import CURRENT, TraceSpan, parse_traceparent

TRACE, ABOVE = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.close()


def exporter_to(collector):
    return SpanExporter.of(Config(otlp_traces_endpoint=collector.url))


def request(exporter, *, path="/generate", traceparent=None, status=200, route="/generate", method="POST"):
    """Send a request through the middleware; returns the span that the application has found."""
    found = []

    async def app(scope, receive, send):
        found.append(CURRENT.get())
        if route is not None:
            scope["route"] = SimpleNamespace(path=route)
        if status:
            await send({"type": "http.response.start", "status": status})

    async def send(_message): ...

    headers = [] if traceparent is None else [(b"traceparent", traceparent.encode())]
    scope = {"type": "http", "path": path, "method": method, "headers": headers}
    asyncio.run(TraceRequests(app, exporter)(scope, None, send))
    return found[0]


def test_spans_arrive_below_their_parents(collector):
    exporter = exporter_to(collector)
    span = request(exporter, traceparent=f"00-{TRACE}-{ABOVE}-01")
    records = []
    TraceSpan("engine", "engine", records.append, TRACE, span.context.span_id).end("broken")
    exporter.export_all(records)
    exporter.close()
    spans = collector.trace(TRACE, "POST /generate", "engine")
    assert path_of(spans, "engine") == ["POST /generate", "engine"]
    assert spans["POST /generate"].parent_id == ABOVE
    assert (spans["engine"].error, spans["engine"].process) == ("broken", "engine")
    assert CURRENT.get() is None


@pytest.mark.parametrize(
    ("status", "route", "method", "name", "error"),
    [
        (503, "/v1/models/{name}", "GET", "GET /v1/models/{name}", "status 503"),
        (404, None, "BREW", "HTTP", ""),
        (0, "/generate", "POST", "POST /generate", "no answer was sent"),
    ],
)
def test_a_span_is_named_by_its_route(status, route, method, name, error):
    records = []
    taking = SimpleNamespace(trace_id=lambda _name, _parent: TRACE, export=records.append)
    request(taking, path="/v1/models/secret", status=status, route=route, method=method)
    (record,) = records
    assert (record.name, record.error, record.parent_id) == (name, error, "")
    assert "secret" not in str(record)


def test_what_is_not_recorded(collector):
    exporter = exporter_to(collector)
    assert request(exporter, traceparent=f"00-{TRACE}-{ABOVE}-00") is None
    assert request(exporter, path="/metrics") is None
    assert request(exporter, traceparent="nonsense") is not None
    exporter.close()


def test_the_sampler_of_the_environment_decides_where_the_client_does_not(collector, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    exporter = exporter_to(collector)
    assert exporter.trace_id("s", None) is None
    assert exporter.trace_id("s", parse_traceparent(f"00-{TRACE}-{ABOVE}-01")) == TRACE
    exporter.close()


def test_a_collector_that_does_not_answer_holds_up_nothing_and_fills_nothing(collector, monkeypatch, caplog):
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.1)
    collector.stall.set()
    exporter = exporter_to(collector)
    records = []
    TraceSpan("s", "front", records.append, TRACE).end()
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        exporter.export_all(records * (3 * QUEUE))
    exporter.close()
    assert time.perf_counter() - start < 30, "each span is a few microseconds, whatever the collector does"
    assert len(exporter._processor._batch_processor._queue) <= QUEUE
    full = [record for record in caplog.records if "full" in record.getMessage()]
    assert len(full) <= 1, "one line, not one for each span"


def test_where_there_is_no_extra_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(
        ConfigError, match=r"^--otlp-traces-endpoint needs the extra: pip install 'multilora\[otel\]'"
    ):
        SpanExporter.of(Config(otlp_traces_endpoint="http://127.0.0.1:1"))


@pytest.mark.parametrize("url", ["", "grpc://host:4317", "host:4318", "http://", "http://host/a b"])
def test_an_endpoint_that_is_none(url):
    with pytest.raises(ConfigError, match="--otlp-traces-endpoint"):
        Config(otlp_traces_endpoint=url)


def test_nothing_is_imported_without_the_flag():
    code = (
        "import sys; from multilora.config import Config; from multilora.server.serve import _ServerProcess;"
        "_ServerProcess(Config()); names = 'opentelemetry.sdk', 'opentelemetry.exporter';"
        "print([name for name in sys.modules if name.startswith(names)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
