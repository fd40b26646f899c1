import json
import warnings

import pytest
from answers import PLACES, TOOLS, answer_of, answers, check_contract, counter
from hypothesis import given
from hypothesis import strategies as st

from multilora.front.tools.base import Arguments, CallEnded, CallStarted, Content
from multilora.front.tools.definitions import Tool
from multilora.front.tools.pythonic import PythonicCalls

CALL = ("get_weather", '{"city": "Paris"}')


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('[get_weather(city="Paris")]', "", [CALL]),
        ("[get_weather(city='Paris'), get_time()]", "", [CALL, ("get_time", "{}")]),
        ('Let me see.\n[get_weather(city="Paris",)]\n', "Let me see.", [CALL]),
        ('<|python_start|>[get_weather(city="Paris")]<|python_end|>', "", [CALL]),
        ('<|python_start|>[get_weather(city="Paris")]', "", [CALL]),
        ('<|python_start|> [ get_weather (city="Paris")] <|python_end|> ok', " ok", [CALL]),
        ('[get_weather(city="Paris"), get_weather(city="Pa', ', get_weather(city="Pa', [CALL]),
        ('[get_weather(city="Paris"), nope(a=1)]', ", nope(a=1)]", [CALL]),
        ('[get_weather(city="Paris")] [1]', " [1]", [CALL]),
        (
            "[search(query='it\\'s (a, b]', limit=-3, tags=['x', (1, 2.5)], o={'k': None, 'd': {}})]",
            "",
            [
                (
                    "search",
                    '{"query": "it\'s (a, b]", "limit": -3, "tags": ["x", [1, 2.5]], "o": {"k": null, "d": {}}}',
                )
            ],
        ),
        ("[search(a=true, b=False, c=null)]", "", [("search", '{"a": true, "b": false, "c": null}')]),
        ('[search(from="a", class="b")]', "", [("search", '{"from": "a", "class": "b"}')]),
        ('[search(query="\\d+\\.")]', "", [("search", '{"query": "\\\\d+\\\\."}')]),
        ('[search(query=r"\\d\\n")]', "", [("search", '{"query": "\\\\d\\\\n"}')]),
        ('[search(query="""a\nb, (c""")]', "", [("search", '{"query": "a\\nb, (c"}')]),
        ('[search(query="a" "b")]', "", [("search", '{"query": "ab"}')]),
        ('[search(\n  query="x",\n  limit=2,\n)]', "", [("search", '{"query": "x", "limit": 2}')]),
        ('[search(query="東京")]', "", [("search", '{"query": "東京"}')]),
    ],
)
def test_answers(text, content, calls):
    assert answer_of(PythonicCalls, text) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3] and [a](http://b)",
        "[nope(a=1)]",
        "[get_weather",
        "[get_weather(",
        "[get_weather('Paris')]",
        "[get_weather(**x)]",
        "[get_weather(city=Paris)]",
        "[get_weather(city=f('x'))]",
        "[get_weather(city=__import__('os').system('true'))]",
        "[get_weather(city=1 + 1)]",
        "[get_weather(city=[x for x in y])]",
        "[get_weather(city=b'a')]",
        "[get_weather(city=f'{a}')]",
        "[get_weather(city=1j)]",
        "[get_weather(city=...)]",
        "[get_weather(city={1: 2})]",
        "[get_weather(city={1, 2})]",
        "[get_weather(city={**a})]",
        "[get_weather(city=1e999)]",
        "[get_weather(city=-1e999)]",
        "[get_weather(city=-True)]",
        "[get_weather(city='\\ud83d')]",
        "[get_weather(city='a', city='b')]",
        "[get_weather(city=)]",
        "[get_weather(city=# nothing\n)]",
        "[get_weather(city=*a)]",
        "[get_weather(, city=1)]",
        "[get_weather(city==1)]",
        "[get_weather(1a=1)]",
        "[get_weather(city=(1])]",
        "[get_weather(city=1}]",
        "[get_weather(city='a\nb')]",
        "[get_weather(city=1\x00)]",
        "<|python_start|>print(1)<|python_end|>",
        "<|python_start|>[print(1)]<|python_end|>",
        f"[get_weather(city={'-' * 100_000}1)]",
        f"[get_weather(city={'not ' * 20_000}1)]",
        f"[get_weather(city={'1+' * 50_000}1)]",
        f"[get_weather(city={'9' * 10_000})]",
        f"[get_weather(city=0x{'f' * 10_000})]",
        f"[get_weather(city={'[' * 100}{']' * 100})]",
        f"[get_weather(city={'(' * 100_000}",
    ],
)
def test_what_is_no_call_is_content(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer_of(PythonicCalls, text) == (text, [])


def test_each_call_comes_with_its_parenthesis():
    parser = PythonicCalls(TOOLS, counter())
    assert parser.push("[get_time(") == []
    assert parser.push(")") == [CallStarted(0, "id0", "get_time"), Arguments(0, "{}"), CallEnded(0)]
    assert parser.push(", get_weather(city=1)") == [
        CallStarted(1, "id1", "get_weather"),
        Arguments(1, '{"city": 1}'),
        CallEnded(1),
    ]
    assert parser.push("]") == []
    assert parser.finish() == []


def test_only_the_beginning_of_an_offered_call_is_held_back():
    parser = PythonicCalls(TOOLS, counter())
    assert parser.push("[ge") == []
    assert parser.push("o") == [Content("[geo")]


def test_names_that_python_could_not_say():
    parser = PythonicCalls([Tool("a.b-c")], counter())
    events = parser.push("[a.b-c(x=1)]")
    assert events == [CallStarted(0, "id0", "a.b-c"), Arguments(0, '{"x": 1}'), CallEnded(0)]


@given(
    answers("[get_time(", "get_weather(", "city=", "'a'", '"b"', ",", ")", "]", "[1, 2]", "\\", "<|python_start|>")
    | answers("[get_weather(city='", "')]", "{'a': 1}", "<|python_end|>", "\\'"),
    PLACES,
)
def test_any_text_in_any_pieces(text, places):
    check_contract(PythonicCalls, text, places)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.sampled_from(["a", "query", "if", "größe"]), VALUES), min_size=1, max_size=3))
def test_what_was_called_is_what_is_read(calls):
    text = ", ".join(f"search({', '.join(f'{k}={v!r}' for k, v in call.items())})" for call in calls)
    content, found = answer_of(PythonicCalls, f"[{text}]")
    assert content == ""
    assert [json.loads(arguments) for _, arguments in found] == calls
