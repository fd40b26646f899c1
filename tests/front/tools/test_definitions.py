import re

import pytest
from answers import tool

from multilora.errors import BadRequest
from multilora.front.tools import definitions
from multilora.front.tools.definitions import Tool, ToolChoice, check_constrainable, parse_tool_choice, parse_tools

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def function(**fields) -> dict:
    return {"type": "function", "function": {"name": "f", **fields}}


def with_property(schema) -> list[dict]:
    return [function(parameters={"type": "object", "properties": {"a": schema}})]


def test_tools():
    tools = [
        {"type": "function", "function": {"name": "f", "description": "F.", "parameters": SCHEMA, "strict": True}},
        {"function": {"name": "ns.g-2/x:y", "description": None, "parameters": None, "strict": None, "more": 1}},
        function(name="h", parameters={}),
    ]
    assert parse_tools(tools) == [Tool("f", "F.", SCHEMA, True), Tool("ns.g-2/x:y"), Tool("h")]


@pytest.mark.parametrize("tools", [None, []])
def test_no_tools(tools):
    assert parse_tools(tools) == []


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"type": ["string", "null"]},
        {"type": "varchar"},  # a prompt may say it; only a grammar cannot
        {"$ref": "http://elsewhere"},
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"enum": [1, "a"]}}]},
        {"type": "array", "items": [{"type": "string"}, False]},
        {"properties": {"type": {"type": "string"}, "$ref": {"type": "string"}, "anyOf": {}}},
        {"const": {"type": 3}, "default": {"anyOf": 3}, "examples": [3]},
    ],
)
def test_schemas_that_prompts_take(schema):
    parse_tools(with_property(schema))


@pytest.mark.parametrize(
    ("tools", "param", "message"),
    [
        ({}, "tools", "must be an array, not object"),
        ("f", "tools", "must be an array, not 'f'"),
        ([3], "tools[0]", "must be an object, not number"),
        ([function(), None], "tools[1]", "must be an object, not null"),
        ([{"type": "web_search"}], "tools[0].type", "'web_search': only 'function'"),
        ([{"type": "function"}], "tools[0].function", "must be an object, not null"),
        ([{"type": "function", "name": "f"}], "tools[0].function", "must be an object, not null"),
        ([function(name=None)], "tools[0].function.name", "null: must be 1 to 128"),
        ([function(name="")], "tools[0].function.name", "'': must be 1 to 128"),
        ([function(name="a b")], "tools[0].function.name", "'a b': must be"),
        ([function(name="f\n")], "tools[0].function.name", "must be"),
        ([function(name="x" * 129)], "tools[0].function.name", "...: must be"),
        ([function(), function()], "tools[1].function.name", "'f': tools[0] has this name too"),
        ([function(description=3)], "tools[0].function.description", "must be a string, not 3"),
        ([function(strict="yes")], "tools[0].function.strict", "must be a boolean, not 'yes'"),
        ([function(parameters=[])], "tools[0].function.parameters", "must be an object, not array"),
        ([function(parameters="{}")], "tools[0].function.parameters", "must be an object, not '{}'"),
        ([function(parameters={"type": "string"})], "tools[0].function.parameters", "'string': the arguments of"),
        ([function(parameters={"type": ["object"]})], "tools[0].function.parameters", "array: the arguments of"),
        ([function(parameters={"properties": 3})], "tools[0].function.parameters.properties", "an object of schemas"),
        ([function(parameters={"required": "a"})], "tools[0].function.parameters.required", "an array of strings"),
        (with_property(3), "tools[0].function.parameters.properties.a", "must be a schema, not 3"),
        (with_property({"type": 3}), "tools[0].function.parameters.properties.a.type", "must be a string or"),
        (with_property({"anyOf": {}}), "tools[0].function.parameters.properties.a.anyOf", "an array of schemas"),
        (with_property({"anyOf": [3]}), "tools[0].function.parameters.properties.a.anyOf[0]", "must be a schema"),
        (with_property({"items": 3}), "tools[0].function.parameters.properties.a.items", "must be a schema, not 3"),
        (with_property({"default": float("nan")}), "tools", "not JSON"),
        (with_property({"default": "\ud83d"}), "tools", "not JSON"),
    ],
)
def test_bad_tools(tools, param, message):
    with pytest.raises(BadRequest, match=re.escape(message)) as e:
        parse_tools(tools)
    assert e.value.param == param
    assert e.value.message.startswith(param)


def test_limits(monkeypatch):
    with pytest.raises(BadRequest, match="513 tools; at most 512"):
        parse_tools([tool(f"f{i}") for i in range(513)])
    with pytest.raises(BadRequest, match=r"tools: \d+ bytes of JSON; at most 1048576"):
        parse_tools([function(description="x" * definitions.MAX_BYTES)])
    deep: dict = {}
    for _ in range(definitions.MAX_DEPTH + 1):
        deep = {"items": deep}
    with pytest.raises(BadRequest, match="nested more than 64 schemas deep"):
        parse_tools(with_property(deep))
    deeper: list = []
    for _ in range(100_000):
        deeper = [deeper]
    with pytest.raises(BadRequest, match="nested too deeply"):
        parse_tools(deeper)


@pytest.mark.parametrize(
    ("schema", "path", "message"),
    [
        ({"type": "varchar"}, "a.type", "'varchar': must be one of array, boolean"),
        ({"type": ["string", "any"]}, "a.type", "'any': must be one of"),
        ({"$ref": "http://elsewhere"}, "a.$ref", "'http://elsewhere': only references within"),
        ({"$ref": "#anchor"}, "a.$ref", "'#anchor': only references within"),
        ({"$ref": 3}, "a.$ref", "3: only references within"),
        ({"not": {"type": "int"}}, "a.not.type", "'int': must be one of"),
    ],
)
def test_schemas_that_no_grammar_can_follow(schema, path, message):
    tools = parse_tools([tool("g"), *with_property(schema)])
    with pytest.raises(BadRequest, match=re.escape(message)) as e:
        check_constrainable(tools)
    assert e.value.param == f"tools[1].function.parameters.properties.{path}"


TOOLS = parse_tools([tool("f"), tool("g")])


@pytest.mark.parametrize(
    ("choice", "tools", "expected"),
    [
        (None, TOOLS, ToolChoice("auto")),
        (None, [], ToolChoice("none")),
        ("auto", TOOLS, ToolChoice("auto")),
        ("auto", [], ToolChoice("none")),
        ("none", TOOLS, ToolChoice("none")),
        ("required", TOOLS, ToolChoice("required")),
        ({"type": "function", "function": {"name": "g"}}, TOOLS, ToolChoice("named", "g")),
        ({"function": {"name": "g"}}, TOOLS, ToolChoice("named", "g")),
        ({"type": "function", "name": "g"}, TOOLS, ToolChoice("named", "g")),
    ],
)
def test_tool_choice(choice, tools, expected):
    parsed = parse_tool_choice(choice, tools)
    assert parsed == expected
    assert parsed.forced == (expected.mode in ("required", "named"))


@pytest.mark.parametrize(
    ("choice", "tools", "param", "message"),
    [
        ("any", TOOLS, "tool_choice", "'any': must be one of auto, none, required"),
        ("required", [], "tool_choice", "the request has no tools"),
        (3, TOOLS, "tool_choice", "must be a string or an object, not 3"),
        ({"type": "allowed_tools"}, TOOLS, "tool_choice.type", "'allowed_tools': only 'function'"),
        ({"type": "function"}, TOOLS, "tool_choice.function.name", "not null"),
        ({"type": "function", "function": "g"}, TOOLS, "tool_choice.function.name", "must be the name"),
        ({"type": "function", "function": {"name": "h"}}, TOOLS, "tool_choice.function.name", "'h': no tool"),
        ({"type": "function", "function": {"name": "f"}}, [], "tool_choice.function.name", "'f': no tool"),
    ],
)
def test_bad_tool_choice(choice, tools, param, message):
    with pytest.raises(BadRequest, match=re.escape(message)) as e:
        parse_tool_choice(choice, tools)
    assert e.value.param == param
