"""The engine's spans, made of the messages that go in and out."""

from time import time_ns

import pytest

from multilora.engine.messages import Abort, Finish, Finished, LoadAdapter, Output, Outputs, Reply, Submit
from multilora.engine.process.request_traces import RequestTraces
from multilora.params import SamplingParams
from multilora.tracing import SpanRecord, TraceSpan

TRACE, ABOVE = "a" * 32, "b" * 16
PARENT = f"00-{TRACE}-{ABOVE}-01"


def submit(rid="r", traceparent=PARENT, adapters=()):
    return Submit(rid=rid, input_ids=[5], sampling=SamplingParams(), adapters=adapters, traceparent=traceparent)


def ended(traces) -> dict[str, SpanRecord]:
    records = traces.take_records()
    assert len({record.name for record in records}) == len(records)
    return {record.name: record for record in records}


def test_a_request_has_its_phases_below_it():
    traces = RequestTraces()
    before = time_ns()
    traces.received(submit())
    traces.sent([Outputs([Output(rid="r", token_ids=[1], queue_seconds=0.0, cached_tokens=3)])])
    assert ended(traces) == {}
    traces.sent([Outputs([Output(rid="r", token_ids=[2, 3], finished=Finished(type="length"))])])
    spans = ended(traces)
    assert set(spans) == {"engine", "queue", "prefill", "decode"}
    assert spans["engine"].parent_id == ABOVE
    assert {spans[name].parent_id for name in ("queue", "prefill", "decode")} == {spans["engine"].span_id}
    assert {span.trace_id for span in spans.values()} == {TRACE}
    assert spans["engine"].attributes["gen_ai.usage.completion_tokens"] == 3
    assert spans["engine"].attributes["multilora.cached_tokens"] == 3
    assert before <= spans["queue"].start <= spans["queue"].end <= spans["prefill"].end <= spans["decode"].end
    assert traces.take_records() == []


@pytest.mark.parametrize("traceparent", [None, "nonsense"])
def test_what_is_not_traced_leaves_nothing(traceparent):
    traces = RequestTraces()
    traces.received(submit(traceparent=traceparent))
    traces.received(LoadAdapter(call=1, version=2, path="/x", traceparent=traceparent))
    traces.sent([Outputs([Output(rid="r", finished=Finished(type="stop"))]), Reply(call=1)])
    assert traces.take_records() == []
    assert not traces._requests
    assert not traces._loads


def test_a_request_that_ends_before_it_runs():
    traces = RequestTraces()
    traces.received(submit())
    traces.received(Abort("r"))
    traces.sent([Outputs([Output(rid="r", finished=Finished(type="abort"))])])
    spans = ended(traces)
    assert set(spans) == {"engine", "queue"}
    assert spans["engine"].attributes["multilora.finish_reason"] == "abort"
    assert not spans["engine"].error


def test_a_stop_string_ends_the_span_and_an_error_is_told():
    traces = RequestTraces()
    traces.received(submit())
    traces.received(Finish("r"))
    assert ended(traces)["engine"].attributes["multilora.finish_reason"] == "stop"
    traces.received(submit("s"))
    traces.sent([Outputs([Output(rid="s", finished=Finished(type="error", kind="StepFailed", message="why"))])])
    assert ended(traces)["engine"].error == "StepFailed: why"


def test_a_fetch_belongs_below_its_load_or_the_request_that_waits_for_it():
    traces = RequestTraces()
    assert traces.traceparent_of(7) is None
    traces.received(LoadAdapter(call=1, version=7, path="/x", traceparent=PARENT))
    traces.received(submit(adapters=((8, 1.0),)))
    of_load, of_request = traces.traceparent_of(7), traces.traceparent_of(8)
    assert of_load.startswith(f"00-{TRACE}-")
    assert of_request not in (None, of_load)
    record = SpanRecord(
        name="loader.fetch",
        process="loader",
        trace_id=TRACE,
        span_id="c" * 16,
        parent_id=of_load[36:52],
        start=1,
        end=2,
    )
    traces.fetched(record)
    traces.sent([Reply(call=1, ok=False, kind="AdapterError", message="why")])
    spans = ended(traces)
    assert spans["loader.fetch"] is record
    assert spans["engine.load_adapter"].span_id == record.parent_id
    assert spans["engine.load_adapter"].error == "AdapterError: why"
    traces.sent([Outputs([Output(rid="r", token_ids=[1])])])
    assert traces.traceparent_of(8) is None, "it runs: it waits for no adapter"


def test_a_span_ends_once():
    records = []
    span = TraceSpan("s", "front", records.append, TRACE)
    span.end("first")
    span.end("second")
    assert [record.error for record in records] == ["first"]
