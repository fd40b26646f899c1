"""Spans and the header that ties them together."""

import pytest

from multilora import tracing
from multilora.tracing import (
    CURRENT,
    TraceContext,
    TraceSpan,
    parse_traceparent,
    span_below,
    span_elsewhere,
    spanning,
)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_header_is_read_as_it_is_written():
    parent = parse_traceparent(TraceContext(TRACE, SPAN).traceparent)
    assert parent.context == TraceContext(TRACE, SPAN)
    assert parent.sampled
    assert not parse_traceparent(f"00-{TRACE}-{SPAN}-00").sampled
    assert parse_traceparent(f"cc-{TRACE}-{SPAN}-01-later-versions-may-say-more").sampled


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0x",
        "x" * 10_000,
    ],
)
def test_what_is_no_traceparent(header):
    assert parse_traceparent(header) is None
    assert span_below(header, "s", "front", print) is None


def test_spans_within_each_other():
    records = []
    root = TraceSpan("root", "front", records.append, TRACE)
    token = CURRENT.set(root)
    with pytest.raises(ValueError, match="why"), spanning("outer", a=1), spanning("inner"):
        raise ValueError("why")
    CURRENT.reset(token)
    root.end()
    inner, outer, top = records
    assert (inner.parent_id, outer.parent_id, top.parent_id) == (outer.span_id, root.context.span_id, "")
    assert (inner.error, outer.error, top.error) == ("ValueError: why", "ValueError: why", "")
    assert outer.attributes == {"a": 1}
    assert top.start <= outer.start <= inner.start <= inner.end <= outer.end <= top.end


def test_nothing_is_done_where_nobody_traces():
    with spanning("s"):
        assert CURRENT.get() is None
    assert tracing.current_child("s") is None
    assert tracing.current_traceparent() is None


def test_what_goes_on_here_for_another_process_is_below_its_span():
    records = []
    token = CURRENT.set(span_elsewhere(f"00-{TRACE}-{SPAN}-01", "front", records.append))
    with spanning("load"):
        pass
    CURRENT.reset(token)
    (load,) = records
    assert (load.name, load.process, load.trace_id, load.parent_id) == ("load", "front", TRACE, SPAN)
    assert span_elsewhere(None, "front", records.append) is None
    assert span_elsewhere("nonsense", "front", records.append) is None
