"""Spans: what a request costs where, in each of the processes that work for it, as one tree.

A process notes what it has done as a `SpanRecord`; a W3C `traceparent` goes with each message to another process, so
that what is done there hangs below. Records come back to the front with the answers, and only the front exports them
(`server/tracing/`): no other process knows OpenTelemetry, and none of them waits for a collector. Where nobody traces
`CURRENT` is None, and a request costs one look at it.
"""

import contextlib
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import msgspec

Value = str | int | float | bool
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


class SpanRecord(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A span that has ended. start, end: nanoseconds since 1970; parent_id: "" at the root; error: "" if it went
    well; server: it is the answer to another program."""

    name: str
    process: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: dict[str, Value] = {}
    error: str = ""
    server: bool = False


class TraceContext(NamedTuple):
    """Which span something belongs below."""

    trace_id: str
    span_id: str

    @property
    def traceparent(self) -> str:
        """The W3C header that says so, of a trace that is recorded."""
        return f"00-{self.trace_id}-{self.span_id}-{_SAMPLED:02x}"


class Parent(NamedTuple):
    """What a client's traceparent says. sampled: whether it records the trace."""

    context: TraceContext
    sampled: bool


def parse_traceparent(header: str) -> Parent | None:
    """None: it says nothing, as it is not well-formed or of the version that is never to be used."""
    match = _TRACEPARENT.fullmatch(header.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return Parent(TraceContext(trace_id, span_id), bool(int(flags, 16) & _SAMPLED))


def new_trace_id() -> str:
    return secrets.token_hex(16)


class TraceSpan:
    """A span that has not ended. `attributes` may be added to until then; `sink` gets its record."""

    def __init__(
        self,
        name: str,
        process: str,
        sink: Callable[[SpanRecord], None],
        trace_id: str,
        parent_id: str = "",
        *,
        start: int | None = None,
        server: bool = False,
    ):
        self.name = name
        self.context = TraceContext(trace_id, secrets.token_hex(8))
        self.attributes: dict[str, Value] = {}
        self.start = time.time_ns() if start is None else start
        self._process = process
        self._sink = sink
        self._parent_id = parent_id
        self._server = server
        self._ended = False

    def child(self, name: str, start: int | None = None) -> "TraceSpan":
        """A span below this one, in the same process."""
        return TraceSpan(name, self._process, self._sink, self.context.trace_id, self.context.span_id, start=start)

    def end(self, error: str = "", end: int | None = None) -> None:
        """Report the span. Later calls do nothing."""
        if self._ended:
            return
        self._ended = True
        self._sink(
            SpanRecord(
                name=self.name,
                process=self._process,
                trace_id=self.context.trace_id,
                span_id=self.context.span_id,
                parent_id=self._parent_id,
                start=self.start,
                end=time.time_ns() if end is None else end,
                attributes=self.attributes,
                error=error,
                server=self._server,
            )
        )


def span_below(
    traceparent: str | None, name: str, process: str, sink: Callable[[SpanRecord], None], start: int | None = None
) -> TraceSpan | None:
    """A span below the one of another process that the message says; None: it says none."""
    parent = parse_traceparent(traceparent) if traceparent else None
    if parent is None:
        return None
    return TraceSpan(name, process, sink, parent.context.trace_id, parent.context.span_id, start=start)


def span_elsewhere(traceparent: str | None, process: str, sink: Callable[[SpanRecord], None]) -> TraceSpan | None:
    """The span of another process that the message says, for what goes on below it here; it is ended there. None: the
    message says none."""
    parent = parse_traceparent(traceparent) if traceparent else None
    if parent is None:
        return None
    span = TraceSpan("", process, sink, parent.context.trace_id)
    span.context = parent.context
    return span


CURRENT: ContextVar[TraceSpan | None] = ContextVar("span", default=None)
"""The span that this task works for; None: nobody traces it."""


def current_child(name: str) -> TraceSpan | None:
    """A span below the current one; None: there is none."""
    current = CURRENT.get()
    return None if current is None else current.child(name)


def current_traceparent() -> str | None:
    """What messages to other processes say of the current span."""
    current = CURRENT.get()
    return None if current is None else current.context.traceparent


@contextlib.contextmanager
def spanning(name: str, **attributes: Value) -> Iterator[None]:
    """What is done within this is a span below the current one, if there is one."""
    span = current_child(name)
    if span is None:
        yield
        return
    span.attributes.update(attributes)
    token = CURRENT.set(span)
    try:
        yield
    except BaseException as e:
        span.end(error=f"{type(e).__name__}: {e}"[:1000])
        raise
    else:
        span.end()
    finally:
        CURRENT.reset(token)
