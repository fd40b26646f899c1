"""Sends spans to a collector, by OTLP over HTTP, on a thread of its own: nothing ever waits for the collector.

Spans are kept until they are sent, at most QUEUE of them; while the collector takes none the oldest are dropped.
OpenTelemetry's environment variables say the rest: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER,
OTEL_EXPORTER_OTLP_HEADERS and others. Called by `serve.py`.
"""

import logging
import threading
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from multilora.config import Config
from multilora.errors import ConfigError
from multilora.tracing import Parent, SpanRecord, new_trace_id

logger = logging.getLogger(__name__)

QUEUE = 2048
BATCH = 256
DELAY_SECONDS = 1.0
EXPORT_SECONDS = 10.0
"""For one batch, with all its retries."""
FLUSH_SECONDS = 2.0
"""For what is left when the server stops."""
SILENT_SECONDS = 60.0
"""A message of OpenTelemetry's about its exports is logged at most so often."""


class SpanExporter:
    """Made by `of`. `close` sends what is left."""

    @classmethod
    def of(cls, config: Config) -> "SpanExporter | None":
        """None: there is no --otlp-traces-endpoint. Raises ConfigError."""
        if config.otlp_traces_endpoint is None:
            return None
        try:
            return cls(_with_path(config.otlp_traces_endpoint))
        except ImportError as e:
            raise ConfigError(
                f"--otlp-traces-endpoint needs the extra: pip install 'multilora[otel]' ({e})"
            ) from None

    def __init__(self, endpoint: str):
        """Raises ImportError if OpenTelemetry is not installed."""
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import Decision

        self._api = trace
        self._span = ReadableSpan
        self._resource = Resource.create()
        if str(self._resource.attributes["service.name"]).startswith("unknown_service"):
            self._resource = self._resource.merge(Resource({"service.name": "multilora"}))
        self._sampled = Decision.RECORD_AND_SAMPLE
        self._sampler = TracerProvider(shutdown_on_exit=False).sampler
        _log_seldom()
        self._processor = BatchSpanProcessor(
            OTLPSpanExporter(endpoint, timeout=EXPORT_SECONDS),
            max_queue_size=QUEUE,
            max_export_batch_size=BATCH,
            schedule_delay_millis=DELAY_SECONDS * 1000,
        )

    def trace_id(self, name: str, parent: Parent | None) -> str | None:
        """The trace that a request belongs to: its client's or a new one; None: it is not recorded, which the client
        says, or OTEL_TRACES_SAMPLER."""
        trace_id = new_trace_id() if parent is None else parent.context.trace_id
        context = None
        if parent is not None:
            remote = self._context(trace_id, parent.context.span_id, sampled=parent.sampled, remote=True)
            context = self._api.set_span_in_context(self._api.NonRecordingSpan(remote))
        result = self._sampler.should_sample(context, int(trace_id, 16), name, self._api.SpanKind.SERVER)
        return trace_id if result.decision is self._sampled else None

    def export(self, record: SpanRecord) -> None:
        """Send the span, later."""
        kinds, status = self._api.SpanKind, self._api.Status
        parent = self._context(record.trace_id, record.parent_id) if record.parent_id else None
        self._processor.on_end(
            self._span(
                name=record.name,
                context=self._context(record.trace_id, record.span_id),
                parent=parent,
                resource=self._resource,
                attributes=record.attributes | {"multilora.process": record.process},
                kind=kinds.SERVER if record.server else kinds.INTERNAL,
                status=status(self._api.StatusCode.ERROR, record.error) if record.error else status(),
                start_time=record.start,
                end_time=max(record.start, record.end),
            )
        )

    def export_all(self, records: Iterable[SpanRecord]) -> None:
        """Send what other processes have recorded, later."""
        for record in records:
            self.export(record)

    def close(self) -> None:
        """Send what is left, for at most FLUSH_SECONDS."""
        flush = threading.Thread(target=self._processor.force_flush, daemon=True)
        flush.start()
        flush.join(FLUSH_SECONDS)

    def _context(self, trace_id: str, span_id: str, *, sampled: bool = True, remote: bool = False) -> Any:
        flags = self._api.TraceFlags(self._api.TraceFlags.SAMPLED if sampled else self._api.TraceFlags.DEFAULT)
        return self._api.SpanContext(int(trace_id, 16), int(span_id, 16), remote, flags)


def _with_path(endpoint: str) -> str:
    """A collector's address without a path means the path that OTLP has for traces."""
    return endpoint.rstrip("/") + "/v1/traces" if urlsplit(endpoint).path in ("", "/") else endpoint


class _Seldom(logging.Filter):
    """Lets each message through once a minute: while a collector is away there is one for every span."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now, message = time.monotonic(), str(record.msg)
        if now - self._shown.get(message, -SILENT_SECONDS) < SILENT_SECONDS:
            return False
        self._shown[message] = now
        return True


def _log_seldom() -> None:
    seldom = _Seldom()
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("opentelemetry."):
            logging.getLogger(name).addFilter(seldom)
