import json

import pytest
from answers import PLACES, TOOLS, answer_of, answers, check_contract, counter
from hypothesis import given
from hypothesis import strategies as st

from multilora.front.tools.base import Arguments, CallEnded, CallStarted
from multilora.front.tools.qwen3_coder import Qwen3CoderCalls, convert

PARIS = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
CALL = ("get_weather", '{"city": "Paris"}')


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (PARIS, "", [CALL]),
        (f"I look.\n\n{PARIS}\n", "I look.", [CALL]),
        (f"{PARIS}\n{PARIS}\nDone", "\nDone", [CALL, CALL]),
        ("<tool_call><function=get_weather><parameter=city>Paris</parameter></function></tool_call>", "", [CALL]),
        ("<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>", "", [CALL]),
        ("<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>", "", [CALL]),
        ("<function=get_weather>\n<parameter=city>\nParis\n</function>", "", [CALL]),
        (
            "<function=get_weather>\n<parameter=city>\nParis\n<parameter=days>\n3\n</parameter></function>",
            "",
            [("get_weather", '{"city": "Paris", "days": 3}')],
        ),
        ("<tool_call>\n<function=get_time>\n</function>\n</tool_call>", "", [("get_time", "{}")]),
        (
            '<function=search><parameter=query>\n<a href="x">\n  3 < 4 = b>\n\n</parameter>'
            '<parameter=tags>["a", {"b": 1}]</parameter><parameter=limit>many</parameter></function>',
            "",
            [("search", '{"query": "<a href=\\"x\\">\\n  3 < 4 = b>\\n", "tags": ["a", {"b": 1}], "limit": "many"}')],
        ),
        ("<function=nope><parameter=x>1</parameter></function>", "", [("nope", '{"x": "1"}')]),
    ],
)
def test_answers(text, content, calls):
    assert answer_of(Qwen3CoderCalls, text) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "Use <tool_call> to call.",
        "<function=",
        "<function=>",
        "<function=a\n>",
        "<tool_call>\n<functions=f>",
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
        "<function=get_weather><parameter=city>Paris",
        "<function=get_weather><parameter=city>Paris</parameter>",
        "<function=get_weather><parameter=>1</parameter></function>",
        "<function=get_weather><parameter=a<b>1</parameter></function>",
        "<function=get_weather><parameter=a>1</parameter><parameter=a>2</parameter></function>",
        "<function=get_weather>text</function>",
    ],
)
def test_what_is_no_call_is_content(text):
    assert answer_of(Qwen3CoderCalls, text) == (text, [])


def test_arguments_come_parameter_by_parameter():
    parser = Qwen3CoderCalls(TOOLS, counter())
    assert parser.push("<tool_call>\n<function=get_weather>") == [CallStarted(0, "id0", "get_weather")]
    assert parser.push("<parameter=city>Par") == []
    assert parser.push("is</parameter>") == [Arguments(0, '{"city": "Paris"')]
    assert parser.push("<parameter=days>2</parameter>") == [Arguments(0, ', "days": 2')]
    assert parser.push("</function>") == [Arguments(0, "}"), CallEnded(0)]
    assert parser.push("\n</tool_call>") == []
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("3", {"type": "string"}, "3"),
        ("3", {"type": "integer"}, 3),
        ("3.0", {"type": "integer"}, 3),
        ("3.5", {"type": "integer"}, "3.5"),
        ("3", {"type": "number"}, 3),
        (" -2.5e1 ", {"type": "number"}, -25.0),
        ("1e999", {"type": "number"}, "1e999"),
        ("NaN", {"type": "number"}, "NaN"),
        ("True", {"type": "boolean"}, True),
        ("false", {"type": "boolean"}, False),
        ("yes", {"type": "boolean"}, "yes"),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ('{"a": 1}', {"type": "array"}, '{"a": 1}'),
        ('["\\ud83d"]', {"type": "array"}, '["\\ud83d"]'),
        ("null", {"type": ["string", "null"]}, None),
        ("None", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ("null", {"type": "string"}, "null"),
        ("4", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 4),
        ("4", {"anyOf": [{"type": "integer"}, {"type": "string"}]}, "4"),
        ("4", {"enum": [1, 2, 4]}, 4),
        ("4", {"enum": ["1", "4"]}, "4"),
        ("true", {"const": True}, True),
        ("4", {"$ref": "#/$defs/N"}, 4),
        ("4", {"$ref": "#/$defs/loop"}, "4"),
        ("4", {"$ref": "#/nowhere/at/all"}, "4"),
        ("4", {}, "4"),
        ("4", {"type": 3, "anyOf": 3, "enum": 3}, "4"),
        ("4", "no schema", "4"),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
    ],
)
def test_values_by_the_schema(text, schema, value):
    root = {"properties": {"x": schema}, "$defs": {"N": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}}
    converted = convert(text, root, "x")
    assert (converted, type(converted)) == (value, type(value))


def test_a_schema_without_properties():
    assert convert("4", {}, "x") == "4"
    assert convert("4", {"properties": 3}, "x") == "4"


@given(
    answers("<tool_call>", "</tool_call>", "<function=search>", "</function>", "<parameter=query>", "</parameter>")
    | answers(PARIS, "\n<parameter=limit>", "12", "\n</function>", "<function=", "text"),
    PLACES,
)
def test_any_text_in_any_pieces(text, places):
    check_contract(Qwen3CoderCalls, text, places)


@given(st.lists(st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_text_comes_back_as_it_was(values):
    parameters = "".join(f"<parameter=p{i}>\n{value}\n</parameter>\n" for i, value in enumerate(values))
    _, [(_, arguments)] = answer_of(
        Qwen3CoderCalls, f"<tool_call>\n<function=f>\n{parameters}</function>\n</tool_call>"
    )
    assert list(json.loads(arguments).values()) == values
