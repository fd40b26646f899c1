"""Covers `tools/json_calls.py`."""

import json

import pytest
from answers import PLACES, TOOLS, answer_of, answers, check_contract, counter, read
from hypothesis import given
from hypothesis import strategies as st

from multilora.front.tools.base import Arguments, CallAbandoned, CallEnded, CallStarted, Content
from multilora.front.tools.hermes import HermesCalls
from multilora.front.tools.scanner import MAX_HELD_SPACE

PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    PARIS,
    '{"name": "search", "arguments": {"query": "a<b", "limit": 3}}',
    '{"arguments": {"a": [1, {"b": null}]}, "name": "x"}',
    '{"name": "f", "arguments": ',
    '"{\\"a\\": 1}"}',
    "</tool",
    "Hello",
    ",",
    "\\",
]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Just text.", "Just text.", []),
        (f"<tool_call>\n{PARIS}\n</tool_call>", "", [("get_weather", '{"city": "Paris"}')]),
        (
            f"Let me look.\n<tool_call>\n{PARIS}\n</tool_call>\n",
            "Let me look.",
            [("get_weather", '{"city": "Paris"}')],
        ),
        (
            f"<tool_call>\n{PARIS}\n</tool_call>\n<tool_call>\n{PARIS}\n</tool_call>",
            "",
            [("get_weather", '{"city": "Paris"}')] * 2,
        ),
        (f"<tool_call>{PARIS}</tool_call> Done.", " Done.", [("get_weather", '{"city": "Paris"}')]),
        # The model forgets a tag, or shares it.
        (f"<tool_call>\n{PARIS}", "", [("get_weather", '{"city": "Paris"}')]),
        (f"<tool_call>{PARIS}<tool_call>{PARIS}</tool_call>", "", [("get_weather", '{"city": "Paris"}')] * 2),
        (f"<tool_call>\n{PARIS}\n{PARIS}\n</tool_call>", "", [("get_weather", '{"city": "Paris"}')] * 2),
        (f"<tool_call>[{PARIS}, {PARIS}]</tool_call>", "", [("get_weather", '{"city": "Paris"}')] * 2),
        # Markup, brackets and escaped quotes inside strings.
        (
            '<tool_call>{"name": "search", "arguments": {"query": "</tool_call> \\"}{[ <tool_call>"}}</tool_call>',
            "",
            [("search", '{"query": "</tool_call> \\"}{[ <tool_call>"}')],
        ),
        # Other orders, other spellings.
        (
            '<tool_call>{"arguments": {"city": "Rome"}, "name": "get_weather"}</tool_call>',
            "",
            [("get_weather", '{"city": "Rome"}')],
        ),
        (
            '<tool_call>{"name": "get_weather", "parameters": {"city": "Oslo"}}</tool_call>',
            "",
            [("get_weather", '{"city": "Oslo"}')],
        ),
        ('<tool_call>{"name": "get_time"}</tool_call>', "", [("get_time", "{}")]),
        ('<tool_call>{"name": "get_time", "arguments": null}</tool_call>', "", [("get_time", "{}")]),
        ('<tool_call>{"name": "get_time", "arguments": {}}</tool_call>', "", [("get_time", "{}")]),
        (
            '<tool_call>{"id": 7, "name": "search", "why": "x", "arguments": "{\\"query\\": \\"a\\"}"}</tool_call>',
            "",
            [("search", '{"query": "a"}')],
        ),
        (
            '<tool_call>{"name": "search", "arguments": {"n": -1.5e3, "ok": true, "l": [], "o": {"d": [1, [2]]}}}'
            "</tool_call>",
            "",
            [("search", '{"n": -1.5e3, "ok": true, "l": [], "o": {"d": [1, [2]]}}')],
        ),
        # Real line breaks in a string are escaped, so that the client can decode it.
        (
            '<tool_call>{"name": "search", "arguments": {"query": "a\n\tb"}}</tool_call>',
            "",
            [("search", '{"query": "a\\n\\tb"}')],
        ),
        # A function that was not offered is the client's to refuse.
        ('<tool_call>{"name": "nope", "arguments": {}}</tool_call>', "", [("nope", "{}")]),
        ('<tool_call>{"name": "天気", "arguments": {"城": "東京"}}</tool_call>', "", [("天気", '{"城": "東京"}')]),
        # White space around calls is markup, elsewhere it is content.
        (f"A.\n\n<tool_call>{PARIS}</tool_call>\n\nB. \n", "A.\n\nB. \n", [("get_weather", '{"city": "Paris"}')]),
    ],
)
def test_answers(text, content, calls):
    assert answer_of(HermesCalls, text) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>\n",
        "a <tool_ca",
        "<tool_call>not json</tool_call>",
        "<tool_call>{}</tool_call>",
        "<tool_call>[]</tool_call>",
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Par',
        '<tool_call>{"name": "get_weather", "arguments": {"city": Paris}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": 3}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": "no object"}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": "{\\"a\\": NaN}"}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": "{\\"a\\": \\"\\ud83d\\"}"}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"a": 01}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"a": 1,}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {"a": 1], "b": 2}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {}, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "get_weather", "arguments": {}, "parameters": {}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>',
        "<tool_call>{'name': 'get_weather', 'arguments': {}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 500 + "</tool_call>",
    ],
)
def test_what_is_no_call_is_content(text):
    assert answer_of(HermesCalls, text) == (text, [])
    assert answer_of(HermesCalls, f"Hm. {text}\n") == (f"Hm. {text}\n", [])


def test_a_call_after_a_broken_one():
    text = f'<tool_call>{{"name": oops}}</tool_call>\n<tool_call>\n{PARIS}\n</tool_call>'
    content, calls = answer_of(HermesCalls, text)
    assert content == '<tool_call>{"name": oops}</tool_call>'
    assert calls == [("get_weather", '{"city": "Paris"}')]


def test_a_broken_call_after_a_good_one():
    text = f'<tool_call>{PARIS}</tool_call>\n<tool_call>{{"name": "search", "arguments": {{"q'
    content, calls = answer_of(HermesCalls, text)
    assert content == '\n<tool_call>{"name": "search", "arguments": {"q'
    assert calls == [("get_weather", '{"city": "Paris"}')]


def test_arguments_stream_as_they_come():
    parser = HermesCalls(TOOLS, counter())
    assert parser.push("Well") == [Content("Well")]
    assert parser.push(".\n<tool_") == [Content(".")]
    assert parser.push('call>{"name": "search", ') == []
    assert parser.push('"arguments": {"que') == [
        CallStarted(0, "id0", "search"),
        Arguments(0, '{"que'),
    ]
    assert parser.push('ry": 1}') == [Arguments(0, 'ry": 1}')]
    assert parser.push("}") == [CallEnded(0)]
    assert parser.push("</tool_call>") == []
    assert parser.finish() == []


def test_an_abandoned_call_gives_its_text_back():
    parser = HermesCalls(TOOLS, counter())
    text = ' <tool_call>{"name": "f", "arguments": {"a": '
    parser.push(text)
    assert parser.finish() == [CallAbandoned(0, text)]


def test_the_index_of_an_abandoned_call_is_not_used_again():
    text = f'<tool_call>{{"name": "f", "arguments": {{oops}}}}</tool_call><tool_call>{PARIS}</tool_call>'
    started = [e for e in read(HermesCalls(TOOLS, counter()), [text]) if isinstance(e, CallStarted)]
    assert [(e.index, e.id) for e in started] == [(0, "id0"), (1, "id1")]


@given(answers(*FRAGMENTS), PLACES)
def test_any_text_in_any_pieces(text, places):
    check_contract(HermesCalls, text, places)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
PLAIN = st.text(alphabet=st.characters(exclude_characters="<", exclude_categories=["Cs"])).map(str.strip)


@given(st.lists(st.tuples(st.dictionaries(st.text(), VALUES, max_size=4), PLAIN), max_size=4), PLAIN, st.booleans())
def test_what_was_called_is_what_is_read(pairs, before, ascii_only):
    text = before
    for arguments, after in pairs:
        call = json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=ascii_only)
        text += f"\n<tool_call>\n{call}\n</tool_call>\n{after}"
    content, calls = answer_of(HermesCalls, text)
    assert [json.loads(arguments) for _, arguments in calls] == [arguments for arguments, _ in pairs]
    assert "".join(content.split()) == "".join("".join([before, *(after for _, after in pairs)]).split())


LONG = ["<tool_call>{" + '"a": ' * 20_000, "<tool_call>" * 20_000, " \n" * 50_000]


@pytest.mark.parametrize("text", [LONG[0], *(pytest.param(text, marks=pytest.mark.slow) for text in LONG[1:])])
def test_long_nonsense(text):
    assert answer_of(HermesCalls, text) == (text, [])


def test_the_longest_space_that_is_markup():
    call, space = f"<tool_call>{PARIS}</tool_call>", " " * 300
    assert answer_of(HermesCalls, f"a{space}{call}")[0] == "a" + " " * (300 - MAX_HELD_SPACE)
    assert answer_of(HermesCalls, f"{call}{space}")[0] == space
    assert answer_of(HermesCalls, f"{call}{space[:MAX_HELD_SPACE]}")[0] == ""
    assert answer_of(HermesCalls, f"{call}{space}b")[0] == f"{space}b"
