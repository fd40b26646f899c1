"""The schemas are held against the compiler that will read them."""

import copy
import json

import pytest
import xgrammar
from answers import TOOLS, counter, read, tool

from multilora.errors import BadRequest
from multilora.front.tools.base import collect
from multilora.front.tools.definitions import ToolChoice, parse_tools
from multilora.front.tools.families import FAMILIES
from multilora.front.tools.forced import RequiredCalls
from multilora.front.tools.schema import forced_schema, parameters_schema, required_schema, strict_tag

TREE = {
    "type": "function",
    "function": {
        "name": "plant",
        "parameters": {
            "type": "object",
            "properties": {"tree": {"$ref": "#/$defs/Node"}},
            "required": ["tree"],
            "$defs": {
                "Node": {
                    "type": "object",
                    "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/Node"}}},
                    "required": ["kids"],
                }
            },
        },
    },
}
OTHER_NODE = {
    "type": "function",
    "function": {
        "name": "count",
        "parameters": {
            "type": "object",
            "properties": {"node": {"$ref": "#/definitions/Node"}, "again": {"anyOf": [{"$ref": "#"}, {"const": 0}]}},
            "required": ["node"],
            "definitions": {"Node": {"type": "integer"}},
        },
    },
}


@pytest.fixture(scope="module")
def compiler() -> xgrammar.GrammarCompiler:
    letters = [chr(i) for i in range(32, 127)] + ["\n", "</s>"]
    return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(letters, stop_token_ids=[len(letters) - 1]))


def accepts(compiler, grammar, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(grammar)
    return matcher.accept_string(text) and matcher.accept_token(96)


def by_schema(compiler, schema: dict, text: str) -> bool:
    return accepts(compiler, compiler.compile_json_schema(json.dumps(schema)), text)


def call(name: str, parameters: str) -> str:
    return f'{{"name": "{name}", "parameters": {parameters}}}'


WEATHER = call("get_weather", '{"city": "Paris", "unit": "C", "days": 3}')
NOW = call("get_time", "{}")


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (f"[{WEATHER}]", True),
        (f"[{WEATHER}, {NOW}]", True),
        ("[]", False),
        (WEATHER, False),
        (f"[{call('nope', '{}')}]", False),
        ('[{"name": "get_time"}]', False),
        (f"[{call('get_weather', '{}')}]", False),
        (f"[{call('get_weather', WEATHER)}]", False),
        (f"[{call('get_time', WEATHER)}]", False),
        ("It is noon.", False),
    ],
)
def test_required(compiler, text, good):
    assert by_schema(compiler, required_schema(TOOLS), text) is good


def test_one_call_only(compiler):
    schema = forced_schema(ToolChoice("required"), TOOLS, parallel=False)
    assert by_schema(compiler, schema, f"[{NOW}]")
    assert not by_schema(compiler, schema, f"[{NOW}, {NOW}]")


def test_definitions_of_two_tools_do_not_meet(compiler):
    tools = parse_tools([TREE, OTHER_NODE])
    before = copy.deepcopy(tools)
    schema = required_schema(tools)
    assert tools == before
    good = [call("plant", '{"tree": {"kids": [{"kids": []}]}}'), call("count", '{"node": 3, "again": {"node": 4}}')]
    bad = [call("plant", '{"tree": 3}'), call("count", '{"node": {"kids": []}}')]
    assert all(by_schema(compiler, schema, f"[{text}]") for text in good)
    assert not any(by_schema(compiler, schema, f"[{text}]") for text in bad)


def test_properties_named_like_keywords_are_left_alone():
    properties = {"$ref": {"type": "string"}, "properties": {"$ref": "#"}, "enum": {"enum": ["$ref"]}}
    data = {"default": {"$ref": "#/x"}, "const": {"$ref": "#/x"}}
    tools = parse_tools([tool("f", **properties, d=data)])
    moved = required_schema(tools)["$defs"]["0"]["properties"]
    assert moved == {**properties, "properties": {"$ref": "#/$defs/0"}, "d": data}


def test_named(compiler):
    schema = forced_schema(ToolChoice("named", "get_weather"), TOOLS)
    assert by_schema(compiler, schema, '{"city": "Paris", "unit": "F", "days": 1}')
    assert not by_schema(compiler, schema, '{"city": "Paris", "unit": "K", "days": 1}')
    assert not by_schema(compiler, schema, f"[{WEATHER}]")


@pytest.mark.parametrize("parameters", [None, {}, {"properties": {}}])
def test_a_function_without_parameters(compiler, parameters):
    (only,) = parse_tools([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    assert by_schema(compiler, parameters_schema(only), "{}")
    assert not by_schema(compiler, parameters_schema(only), '{"a": 1}')
    assert not by_schema(compiler, parameters_schema(only), "3")
    assert by_schema(compiler, required_schema([only]), f"[{call('f', '{}')}]")


@pytest.mark.parametrize("mode", ["auto", "none"])
def test_nothing_is_forced(mode):
    assert forced_schema(ToolChoice(mode), TOOLS) is None


def test_a_schema_that_no_grammar_can_follow():
    tools = parse_tools([tool("f", a={"type": "varchar"})])
    assert forced_schema(ToolChoice("auto"), tools) is None
    with pytest.raises(BadRequest, match="'varchar': must be one of") as e:
        forced_schema(ToolChoice("required"), tools)
    assert e.value.param == "tools[0].function.parameters.properties.a.type"
    strict = [{"type": "function", "function": {**tool("f", a={"type": "varchar"})["function"], "strict": True}}]
    with pytest.raises(BadRequest, match="'varchar'"):
        strict_tag(parse_tools(strict), "<", "<{name}", ">")


def test_what_the_grammar_lets_through_is_read_back(compiler):
    text = f"[{WEATHER}, {NOW}]"
    assert by_schema(compiler, required_schema(TOOLS), text)
    answer = collect(read(RequiredCalls(TOOLS, counter()), [text]))
    assert answer.content == ""
    assert [c.name for c in answer.calls] == ["get_weather", "get_time"]


STRICT = parse_tools(
    [
        {"type": "function", "function": {**tool("f", a={"type": "integer"})["function"], "strict": True}},
        tool("g", b={"type": "integer"}),
    ]
)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("hermes", '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'),
        ("llama3_json", '<|python_tag|>{{"name": "{}", "parameters": {}}}'),
    ],
)
def test_strict_tools_under_auto(compiler, name, write):
    family = FAMILIES[name]
    assert family.strict_tag(TOOLS) is None
    grammar = compiler.compile_structural_tag(family.strict_tag(STRICT))
    single = compiler.compile_structural_tag(family.strict_tag(STRICT, parallel=False))
    assert accepts(compiler, grammar, "Just text.")
    good = write.format("f", '{"a": 1}')
    assert accepts(compiler, grammar, good)
    assert accepts(compiler, single, good)
    assert accepts(compiler, grammar, good + good)
    assert not accepts(compiler, single, good + good)
    assert not accepts(compiler, grammar, write.format("f", '{"a": "x"}'))
    assert not accepts(compiler, grammar, write.format("nope", "{}"))
    assert accepts(compiler, grammar, write.format("g", '{"b": "x"}')), "g is not strict"
    answer = collect(read(family.parser(STRICT, counter()), [good]))
    assert [(c.name, c.arguments) for c in answer.calls] == [("f", '{"a": 1}')]
    assert answer.content == ""


@pytest.mark.parametrize("name", ["mistral", "pythonic", "qwen3_coder"])
def test_families_without_a_tag(name):
    assert FAMILIES[name].strict_tag(STRICT) is None
