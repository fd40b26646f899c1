"""The engine's part of traces: a span for each traced request, with its queue, prefill and decode, and for each load.

It reads the messages that go in and out, so neither engine nor scheduler know of it; while no request is traced that
costs a look at an empty dict for each step. Used by `worker.py`, and as `LoadTraces` by the adapter store.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from multilora.engine.messages import (
    Abort,
    Finish,
    FromEngine,
    LoadAdapter,
    Output,
    Outputs,
    Reply,
    Submit,
    ToEngine,
)
from multilora.tracing import SpanRecord, TraceSpan, span_below

PROCESS = "engine"


@dataclass(eq=False)
class _Request:
    """first: when its first tokens came, nanoseconds since 1970; 0: they have not."""

    span: TraceSpan
    versions: frozenset[int]
    queue_seconds: float = 0.0
    first: int = 0
    tokens: int = 0


class RequestTraces:
    """`take_records` has what has ended since."""

    def __init__(self) -> None:
        self._requests: dict[str, _Request] = {}  # by rid
        self._loads: dict[int, tuple[int, TraceSpan]] = {}  # by call: version, span
        self._records: list[SpanRecord] = []

    # ------------------------------------------------------------------ what the worker sees

    def received(self, message: ToEngine) -> None:
        """A message is about to be given to the engine."""
        match message:
            case Submit(traceparent=str(parent)):
                if (span := span_below(parent, "engine", PROCESS, self._records.append)) is not None:
                    versions = frozenset(version for version, _ in message.adapters)
                    self._requests[message.rid] = _Request(span, versions)
            case LoadAdapter(traceparent=str(parent)):
                if (span := span_below(parent, "engine.load_adapter", PROCESS, self._records.append)) is not None:
                    span.attributes["multilora.adapter.version"] = message.version
                    self._loads[message.call] = message.version, span
            case Finish(rid):
                self._end(rid, "stop")
            case Abort():
                pass  # the request's last Output says when it has ended

    def sent(self, messages: Iterable[FromEngine]) -> None:
        """The engine has said this."""
        if not self._requests and not self._loads:
            return
        for message in messages:
            match message:
                case Outputs(items):
                    for output in items:
                        if (request := self._requests.get(output.rid)) is not None:
                            self._take(request, output)
                case Reply(call=call) if call in self._loads:
                    _, span = self._loads.pop(call)
                    span.end("" if message.ok else f"{message.kind}: {message.message}"[:1000])

    def take_records(self) -> list[SpanRecord]:
        """The spans that have ended since the last call."""
        records, self._records[:] = self._records[:], []
        return records

    def _take(self, request: _Request, output: Output) -> None:
        request.tokens += len(output.token_ids)
        ran = output.finished is not None and output.finished.type not in ("abort", "error")  # perhaps without tokens
        if (output.token_ids or ran) and not request.first:
            request.first, request.queue_seconds = time.time_ns(), output.queue_seconds
            request.span.attributes["gen_ai.latency.time_in_queue"] = output.queue_seconds
            request.span.attributes["multilora.cached_tokens"] = output.cached_tokens
        if output.finished is not None:
            failed = output.finished.type == "error"
            error = f"{output.finished.kind}: {output.finished.message}"[:1000] if failed else ""
            self._end(output.rid, output.finished.type, error)

    def _end(self, rid: str, reason: str, error: str = "") -> None:
        request = self._requests.pop(rid, None)
        if request is None:
            return
        span, end = request.span, time.time_ns()
        if request.first:
            # start ── queue ── began ── prefill ── first ── decode ── end
            began = min(span.start + int(request.queue_seconds * 1e9), request.first)
            for name, since, until in (
                ("queue", span.start, began),
                ("prefill", began, request.first),
                ("decode", request.first, end),
            ):
                span.child(name, start=since).end(end=until)
            span.attributes["gen_ai.latency.time_in_model_prefill"] = (request.first - began) / 1e9
            span.attributes["gen_ai.latency.time_in_model_decode"] = (end - request.first) / 1e9
            span.attributes["gen_ai.latency.time_in_model_inference"] = (end - began) / 1e9
        else:
            span.child("queue", start=span.start).end(end=end)
        span.attributes["multilora.finish_reason"] = reason
        span.attributes["gen_ai.usage.completion_tokens"] = request.tokens
        span.end(error, end)

    # ------------------------------------------------------------------ what the adapter store asks

    def traceparent_of(self, version: int) -> str | None:
        """The span that a fetch of the version belongs below: its load's, or that of the first traced request which
        waits for it. O(traced requests)."""
        for loading, span in self._loads.values():
            if loading == version:
                return span.context.traceparent
        for request in self._requests.values():
            if version in request.versions and not request.first:
                return request.span.context.traceparent
        return None

    def fetched(self, record: SpanRecord) -> None:
        """The loader has ended a fetch that it was told a span for."""
        self._records.append(record)
