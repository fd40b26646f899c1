import re

from multilora.front.tools.base import (
    Arguments,
    Call,
    CallAbandoned,
    CallEnded,
    CallStarted,
    Content,
    ParsedAnswer,
    Reasoning,
    collect,
    mistral_call_id,
    openai_call_id,
)


def test_ids():
    assert re.fullmatch(r"call_[0-9a-f]{24}", openai_call_id())
    assert re.fullmatch(r"[A-Za-z0-9]{9}", mistral_call_id())
    assert len({make() for make in (openai_call_id, mistral_call_id) for _ in range(100)}) == 200


def test_what_events_add_up_to():
    events = [
        Reasoning("I "),
        Reasoning("think."),
        Content("a"),
        CallStarted(0, "x", "f"),
        Arguments(0, "{"),
        Arguments(0, "}"),
        CallEnded(0),
        CallStarted(1, "y", "g"),
        Arguments(1, "{"),
        CallAbandoned(1, "<g {"),
        Content("b"),
    ]
    assert collect(events) == ParsedAnswer("a<g {b", "I think.", [Call("x", "f", "{}")])
    assert collect([]) == ParsedAnswer()
