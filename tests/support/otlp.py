"""A collector of OpenTelemetry traces for tests: OTLP over HTTP on loopback, as protobuf."""

import threading
from collections import defaultdict
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

SECONDS = 120


@dataclass(frozen=True)
class ReceivedSpan:
    name: str
    process: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: dict[str, Any]
    error: str
    service: str


class Collector:
    """Collects spans by trace until `close`. `stall`: an event; while it is set the collector answers nothing."""

    def __init__(self) -> None:
        self._traces: dict[str, list[ReceivedSpan]] = defaultdict(list)
        self._changed = threading.Condition()
        self.stall = threading.Event()
        self._closed = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                if collector.stall.is_set():
                    collector._closed.wait(SECONDS)
                    return
                assert self.path == "/v1/traces", self.path
                collector._take(ExportTraceServiceRequest.FromString(data))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _take(self, request: ExportTraceServiceRequest) -> None:
        with self._changed:
            for group in request.resource_spans:
                resource = {a.key: a.value.string_value for a in group.resource.attributes}
                for span in (span for scope in group.scope_spans for span in scope.spans):
                    says = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
                    self._traces[span.trace_id.hex()].append(
                        ReceivedSpan(
                            name=span.name,
                            process=says["multilora.process"],
                            span_id=span.span_id.hex(),
                            parent_id=span.parent_span_id.hex(),
                            start=span.start_time_unix_nano,
                            end=span.end_time_unix_nano,
                            attributes=says,
                            error=span.status.message,
                            service=resource["service.name"],
                        )
                    )
            self._changed.notify_all()

    def trace(self, trace_id: str, *names: str) -> dict[str, ReceivedSpan]:
        """The spans of a trace by name, once it has all of these. No name may come twice."""

        def there() -> bool:
            return {span.name for span in self._traces[trace_id]} >= set(names)

        with self._changed:
            assert self._changed.wait_for(there, SECONDS), (names, self._traces[trace_id])
            found = {span.name: span for span in self._traces[trace_id]}
            assert len(found) == len(self._traces[trace_id])
            return found

    @property
    def count(self) -> int:
        """How many traces there are."""
        with self._changed:
            return len(self._traces)

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def path_of(spans: dict[str, ReceivedSpan], name: str) -> list[str]:
    """The names from the root to a span."""
    by_id = {span.span_id: span for span in spans.values()}
    names = [name]
    while (parent := by_id.get(spans[names[0]].parent_id)) is not None:
        names.insert(0, parent.name)
    return names
