import pytest
from answers import PLACES, answer_of, answers, check_contract, counter
from hypothesis import given

from multilora.front.tools.base import Arguments, CallEnded, CallStarted
from multilora.front.tools.forced import NamedCall, RequiredCalls


def named(tools, new_id):
    return NamedCall("search", new_id)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('[{"name": "get_time", "parameters": {}}]', "", [("get_time", "{}")]),
        (
            '[{"name":"get_time","parameters":{}} , {"name":"search","parameters":{"query":"]["}}]\n',
            "",
            [("get_time", "{}"), ("search", '{"query":"]["}')],
        ),
        ('[{"name": "get_time", "parameters": {}}, {"na', ', {"na', [("get_time", "{}")]),
        ('[{"name": "search", "parameters": {"query": "cut', '[{"name": "search", "parameters": {"query": "cut', []),
        ("Sorry.", "Sorry.", []),
        ("", "", []),
    ],
)
def test_required(text, content, calls):
    assert answer_of(RequiredCalls, text) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"query": "x", "limit": 2}', "", [("search", '{"query": "x", "limit": 2}')]),
        (' {"query": {}}\n', "", [("search", '{"query": {}}')]),
        ("{}", "", [("search", "{}")]),
        ('{"query": "cut', '{"query": "cut', []),
        ("[1]", "[1]", []),
        ("{} more", " more", [("search", "{}")]),
    ],
)
def test_named(text, content, calls):
    assert answer_of(named, text) == (content, calls)


def test_a_named_call_streams_from_its_first_character_on():
    parser = NamedCall("f", counter())
    assert parser.push('{"') == [CallStarted(0, "id0", "f"), Arguments(0, '{"')]
    assert parser.push('a":1}')[-1] == CallEnded(0)


FRAGMENTS = ["[", '{"name": "f", ', '"parameters": ', '{"a": 1}', "}", ",", "]", "\\"]


@given(answers(*FRAGMENTS), PLACES)
def test_any_text_in_any_pieces(text, places):
    check_contract(RequiredCalls, text, places)
    check_contract(named, text, places)
