import pytest
from answers import PLACES, TOOLS, answer_of, answers, check_contract, counter
from hypothesis import given

from multilora.front.tools.base import Content
from multilora.front.tools.llama3_json import Llama3JsonCalls

PARIS = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
CALL = ("get_weather", '{"city": "Paris"}')


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (PARIS, "", [CALL]),
        (f"\n\n{PARIS}\n", "", [CALL]),
        (f"<|python_tag|>{PARIS}", "", [CALL]),
        (f"{PARIS}; {PARIS}", "", [CALL, CALL]),
        (f"<|python_tag|>{PARIS};{PARIS} ;\n{PARIS}", "", [CALL] * 3),
        (f"{PARIS}\n{PARIS}", "", [CALL, CALL]),
        (f"{PARIS}, {PARIS}", "", [CALL, CALL]),
        (f"Sure. <|python_tag|>{PARIS}", "Sure.", [CALL]),
        ('{"type": "function", "name": "get_time", "parameters": {}}', "", [("get_time", "{}")]),
        ('{"name": "search", "arguments": {"query": "x;{"}}', "", [("search", '{"query": "x;{"}')]),
        ('{"parameters": {"query": "x"}, "name": "search"}', "", [("search", '{"query": "x"}')]),
        (f"{PARIS} and that is all.", " and that is all.", [CALL]),
        (f"{PARIS}; and that is all.", "; and that is all.", [CALL]),
        (f"{PARIS};", ";", [CALL]),
        # With the tag, any function is a call.
        ('<|python_tag|>{"name": "nope", "parameters": {}}', "", [("nope", "{}")]),
        (f'{PARIS}; {{"name": "nope", "parameters": {{}}}}', '; {"name": "nope", "parameters": {}}', [CALL]),
    ],
)
def test_answers(text, content, calls):
    assert answer_of(Llama3JsonCalls, text) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "Text.",
        '{"city": "Paris", "name": "get_weather", "parameters": {}}',
        '{"name": "Paris", "parameters": {"a": 1}}',
        '{"name": "get_weather"}',
        '{"name": "get_weather", "population": 3}',
        '{"type": "city", "name": "get_weather", "parameters": {}}',
        '{"name": "get_weather", "parameters": {"city": "Par',
        '{"name": "get_weather", "parameters": {"city": Paris}}',
        f"The call is {PARIS}",
        f"[{PARIS}]",
        '<|python_tag|>brave_search.call(query="x")',
        "<|python_tag|>",
        "{",
        " \n",
    ],
)
def test_what_is_no_call_is_content(text):
    assert answer_of(Llama3JsonCalls, text) == (text, [])


def test_other_json_streams_from_its_first_other_member_on():
    parser = Llama3JsonCalls(TOOLS, counter())
    assert parser.push('{"city') == []
    assert parser.push('"') == [Content('{"city"')]
    assert parser.push(' "Paris"') == [Content(' "Paris"')]


@given(
    answers("<|python_tag|>", PARIS, ";", ",", '{"name": "search", ', '"parameters": {"a": 1}}', "<|python", "text"),
    PLACES,
)
def test_any_text_in_any_pieces(text, places):
    check_contract(Llama3JsonCalls, text, places)
