import re

import pytest
from answers import TOOLS, counter, read

from multilora.front.tools.base import CallStarted, collect
from multilora.front.tools.definitions import ToolChoice
from multilora.front.tools.families import FAMILIES, choose, open_parser

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
HERMES = (
    'In <tool_call></tool_call> tags:\n<tool_call>\n{\\"name\\": <name>, \\"arguments\\": <object>}\n</tool_call>'
)
JINJA_HERMES = """{{ '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}{{ '}\n</tool_call>' }}"""
CODER = "<tool_call>\n<function=example>\n<parameter=p>\nvalue\n</parameter>\n</function>\n</tool_call>"
GLM = '<tool_call>{name}<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call> {"arguments": 1}'
LLAMA = (
    "<|start_header_id|>system<|end_header_id|>\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
)
LLAMA_PYTHONIC = "<|start_header_id|>system<|end_header_id|>\nin the format of [func_name1(name1=value1), f()]"
MISTRAL = '{{- "[TOOL_CALLS] [" }}{"name": , "arguments": }{{ "]" }}'


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("", None),
        (CHATML, None),
        (HERMES, "hermes"),
        (JINJA_HERMES, "hermes"),
        (CODER, "qwen3_coder"),
        (GLM, None),
        (LLAMA, "llama3_json"),
        (LLAMA_PYTHONIC, "pythonic"),
        (MISTRAL, "mistral"),
        ("<|start_header_id|>{{ m.role }}<|end_header_id|>", None),
        (HERMES + MISTRAL, None),
        ("Mention <tool_call> only.", None),
    ],
)
def test_the_family_of_a_template(template, name):
    assert choose(template) == name
    assert name is None or name in FAMILIES


@pytest.mark.parametrize("name", [*sorted(FAMILIES), None])
def test_each_family(name):
    family = FAMILIES[name] if name else None
    text = "No call here, [1] <b> {."
    auto = open_parser(family, ToolChoice("auto"), TOOLS)
    assert (auto is None) == (name is None)
    assert auto is None or collect(read(auto, [text])).content == text
    required = open_parser(family, ToolChoice("required"), TOOLS)
    (call,) = collect(read(required, ['[{"name": "get_time", "parameters": {}}]'])).calls
    assert (call.name, call.arguments) == ("get_time", "{}")
    named = open_parser(family, ToolChoice("named", "search"), TOOLS)
    (call,) = collect(read(named, ['{"query": "x"}'])).calls
    assert (call.name, call.arguments) == ("search", '{"query": "x"}')
    pattern = "[A-Za-z0-9]{9}" if name == "mistral" else "call_[0-9a-f]{24}"
    assert re.fullmatch(pattern, call.id)
    assert open_parser(family, ToolChoice("none"), TOOLS) is None


@pytest.mark.parametrize("name", ["hermes", "qwen", "qwen25", "qwen3"])
def test_other_names_of_one_format(name):
    events = read(FAMILIES[name].parser(TOOLS, counter()), ['<tool_call>{"name": "get_time"}</tool_call>'])
    assert CallStarted(0, "id0", "get_time") in events
