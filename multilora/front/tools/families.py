"""The tool-call formats by name, and which of them a chat template speaks.

The names are those that users of SGLang and of vLLM type after `--tool-call-parser`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from multilora.front.tools import schema
from multilora.front.tools.base import NewId, ParserFactory, ToolCallParser, mistral_call_id, openai_call_id
from multilora.front.tools.definitions import Tool, ToolChoice
from multilora.front.tools.forced import NamedCall, RequiredCalls
from multilora.front.tools.hermes import HermesCalls
from multilora.front.tools.llama3_json import Llama3JsonCalls
from multilora.front.tools.mistral import MistralCalls
from multilora.front.tools.pythonic import PythonicCalls
from multilora.front.tools.qwen3_coder import Qwen3CoderCalls


@dataclass(frozen=True)
class Family:
    """parser: makes the parser of one answer; new_id: makes call ids that the family's templates accept.

    strict: trigger, begin and end of a call for `schema.strict_tag`; None: the format has no one beginning of a call.
    """

    parser: ParserFactory
    new_id: NewId = openai_call_id
    strict: tuple[str, str, str] | None = None

    def open(self, choice: ToolChoice, tools: Sequence[Tool]) -> ToolCallParser:
        """The parser for one answer under `choice`; forced answers are JSON in every family."""
        return open_forced(choice, tools, self.new_id) or self.parser(tools, self.new_id)

    def strict_tag(self, tools: Sequence[Tool], *, parallel: bool = True) -> dict[str, Any] | None:
        """The structural tag that strict tools want under "auto"; None: none is strict, or the format has no tag."""
        return schema.strict_tag(tools, *self.strict, parallel=parallel) if self.strict else None


def open_forced(
    choice: ToolChoice, tools: Sequence[Tool], new_id: NewId = openai_call_id
) -> RequiredCalls | NamedCall | None:
    """The parser of an answer made under `schema.forced_schema`; None: the choice forces nothing."""
    if choice.name is not None:
        return NamedCall(choice.name, new_id)
    return RequiredCalls(tools, new_id) if choice.forced else None


_HERMES = Family(
    HermesCalls, strict=("<tool_call>", '<tool_call>\n{"name": "{name}", "arguments": ', "}\n</tool_call>")
)
_LLAMA3 = Family(Llama3JsonCalls, strict=("<|python_tag|>", '<|python_tag|>{"name": "{name}", "parameters": ', "}"))
_MISTRAL = Family(MistralCalls, new_id=mistral_call_id)

FAMILIES: dict[str, Family] = {
    "hermes": _HERMES,
    "qwen": _HERMES,
    "qwen25": _HERMES,
    "qwen3": _HERMES,
    "llama3": _LLAMA3,
    "llama3_json": _LLAMA3,
    "llama4_json": _LLAMA3,
    "mistral": _MISTRAL,
    "pythonic": Family(PythonicCalls),
    "llama4_pythonic": Family(PythonicCalls),
    "qwen3_coder": Family(Qwen3CoderCalls),
    "qwen3_xml": Family(Qwen3CoderCalls),
}


def choose(chat_template: str) -> str | None:
    """The name of the family whose format `chat_template` teaches; None unless exactly one of the rules knows it."""
    found = [name for name, speaks in _RULES if speaks(chat_template)]
    return found[0] if len(found) == 1 else None


def _contains(*texts: str, without: Sequence[str] = ()) -> Callable[[str], bool]:
    return lambda template: all(t in template for t in texts) and not any(t in template for t in without)


# Formats that have a marker in common with one of ours and differ after it.
_OTHER_TOOL_CALLS = ("<arg_key>", "<function=", "<tool_calls>", "<|tool_calls_section_begin|>", "<function name=")

_RULES: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("qwen3_coder", _contains("<tool_call>", "<function=", "<parameter=")),
    ("mistral", _contains("[TOOL_CALLS]")),
    ("hermes", _contains("<tool_call>", "</tool_call>", '"arguments', without=_OTHER_TOOL_CALLS)),
    ("pythonic", _contains("[func_name1(")),
    (
        "llama3_json",
        _contains("<|start_header_id|>", '{"name": function name, "parameters": ', without=("[func_name1(",)),
    ),
)
