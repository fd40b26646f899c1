from answers import PLACES, TOOLS, answers, counter, cut, joined, read
from hypothesis import given

from multilora.front.tools.answer import AnswerReader
from multilora.front.tools.base import Call, CallStarted, ParsedAnswer, collect
from multilora.front.tools.hermes import HermesCalls
from multilora.front.tools.reasoning import REASONING

CALL = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


def both(**options) -> AnswerReader:
    return AnswerReader(REASONING["qwen3"](""), HermesCalls(TOOLS, counter()), **options)


def test_thoughts_content_and_calls():
    text = f"<think>\nI could {CALL[:11]} it.\n</think>\n\nLet me see.\n{CALL}\n{CALL}"
    expected = ParsedAnswer(
        "Let me see.", "I could <tool_call> it.", [Call("id0", "get_time", "{}"), Call("id1", "get_time", "{}")]
    )
    assert collect(read(both(), [text])) == expected
    assert collect(read(both(), text)) == expected


def test_thoughts_that_a_call_ends():
    answer = collect(read(both(), [f"<think>\nI call it.\n{CALL}"]))
    assert answer == ParsedAnswer("", "I call it.", [Call("id0", "get_time", "{}")])


def test_the_first_call_only():
    events = read(both(parallel=False), [f"{CALL}\n{CALL}\n<tool_call>{{"])
    assert [e.index for e in events if isinstance(e, CallStarted)] == [0]
    assert len(collect(events).calls) == 1


def test_one_parser_or_none():
    assert collect(read(AnswerReader(None, None), ["<think>a", "</think>b"])) == ParsedAnswer("<think>a</think>b")
    assert collect(read(AnswerReader(REASONING["qwen3"](""), None), [f"<think>a</think>{CALL}"])) == ParsedAnswer(
        CALL, "a"
    )
    assert collect(read(AnswerReader(None, HermesCalls(TOOLS, counter())), [CALL])).calls == [
        Call("id0", "get_time", "{}")
    ]


@given(answers("<think>", "</think>", CALL, "<tool_call>", "\n"), PLACES)
def test_any_text_in_any_pieces(text, places):
    whole = joined(read(both(), [text]))
    assert joined(read(both(), cut(text, places))) == whole
