"""The grammar that follows from the tools of a request, held against the compiler that will read it."""

import json
from typing import Any

import pytest
import xgrammar

from multilora.errors import BadRequest
from multilora.front.tools.request import ToolRequest
from multilora.params import SamplingParams

CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
LETTERS = [chr(i) for i in range(32, 127)] + ["\n", "</s>"]
COMPILER = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(LETTERS, stop_token_ids=[96]))
ROME, PARIS = '{"city": "Rome"}', '{"city": "Paris"}'


def request(
    choice: Any, *, strict: bool = False, family: str | None = "hermes", parallel: bool = True
) -> ToolRequest:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": strict}}]
    return ToolRequest.parse(
        tools, choice, parallel=parallel, chat_template="", tool_call_parser=family, reasoning_parser=None
    )


def accepts(sampling: SamplingParams, text: str) -> bool:
    assert sampling.grammar_field == "structural_tag"
    matcher = xgrammar.GrammarMatcher(COMPILER.compile_structural_tag(sampling.structural_tag))
    return matcher.accept_string(text) and matcher.accept_token(96)


def hermes(arguments: str) -> str:
    return f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_calls_leave_no_room_for_endless_white_space(choice):
    sampling = request(choice).constrain(SamplingParams())

    def call(arguments: str) -> str:
        return f'[{{"name": "weather", "parameters": {arguments}}}]' if choice == "required" else arguments

    assert accepts(sampling, call(ROME))
    assert accepts(sampling, call('{\n    "city":  "Rome"\n}'))
    assert not accepts(sampling, call(PARIS))
    for endless in ('{"city":' + 9 * " " + '"Rome"}', "{" + 9 * "\n" + '"city": "Rome"}'):
        assert not accepts(sampling, call(endless))


def test_strict_tools_under_auto():
    sampling = request("auto", strict=True).constrain(SamplingParams())
    assert accepts(sampling, "No call.")
    assert accepts(sampling, f"First {hermes(ROME)} and {hermes(ROME)}")
    assert not accepts(sampling, hermes(PARIS))
    assert not accepts(sampling, hermes('{"city":' + 9 * " " + '"Rome"}'))
    alone = request("auto", strict=True, parallel=False).constrain(SamplingParams())
    assert accepts(alone, f"First {hermes(ROME)}")
    assert not accepts(alone, f"First {hermes(ROME)} and {hermes(ROME)}")


@pytest.mark.parametrize(
    ("tools", "own"),
    [
        (request("auto"), {}),
        (request("none", strict=True), {}),
        (request("auto", strict=True, family=None), {}),
        (request("auto", strict=True, family="pythonic"), {}),
        (request("auto", strict=True), {"regex": "a"}),  # which leaves no room for a call
    ],
)
def test_nothing_is_constrained(tools, own):
    assert tools.constrain(SamplingParams(**own)) == SamplingParams(**own)


def test_a_forced_call_and_another_grammar_are_refused_by_both_names():
    with pytest.raises(BadRequest, match=r"tool_choice: .* cannot be combined with ebnf") as caught:
        request("required").constrain(SamplingParams(ebnf='root ::= "a"'))
    assert caught.value.param == "tool_choice"
    assert json.loads(request("required").constrain(SamplingParams()).structural_tag)["type"] == "structural_tag"
