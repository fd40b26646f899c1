"""The tool-call formats by name, and the detection of the format that a chat template teaches.

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

    markers: texts that are special tokens in tokenizers of the family, without which the parser sees no call: the
    detokenizer must not skip them. strict: trigger, begin and end of a call for `schema.strict_tag`; None: the
    format has no one beginning of a call.
    """

    parser: ParserFactory
    markers: tuple[str, ...]
    new_id: NewId = openai_call_id
    strict: tuple[str, str, str] | None = None

    def strict_tag(self, tools: Sequence[Tool], *, parallel: bool = True) -> dict[str, Any] | None:
        """The structural tag that strict tools want under "auto"; None: none is strict, or the format has no tag."""
        return schema.strict_tag(tools, *self.strict, parallel=parallel) if self.strict else None


def open_parser(family: Family | None, choice: ToolChoice, tools: Sequence[Tool]) -> ToolCallParser | None:
    """The parser for one answer; None: all text is content. family: None if the model has no known format.

    Forced answers are made under `schema.forced_schema`, so they are JSON whatever the family.
    """
    new_id = family.new_id if family else openai_call_id
    if choice.name is not None:
        return NamedCall(choice.name, new_id)
    if choice.forced:
        return RequiredCalls(tools, new_id)
    return family.parser(tools, new_id) if family and choice.mode == "auto" else None


_HERMES = Family(
    HermesCalls,
    ("<tool_call>", "</tool_call>"),
    strict=("<tool_call>", '<tool_call>\n{"name": "{name}", "arguments": ', "}\n</tool_call>"),
)
_LLAMA3 = Family(
    Llama3JsonCalls,
    ("<|python_tag|>",),
    strict=("<|python_tag|>", '<|python_tag|>{"name": "{name}", "parameters": ', "}"),
)
_MISTRAL = Family(MistralCalls, ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), new_id=mistral_call_id)
_PYTHONIC = Family(PythonicCalls, ("<|python_start|>", "<|python_end|>"))
_QWEN3_CODER = Family(Qwen3CoderCalls, ("<tool_call>", "</tool_call>"))

FAMILIES: dict[str, Family] = {
    "hermes": _HERMES,
    "qwen": _HERMES,
    "qwen25": _HERMES,
    "qwen3": _HERMES,
    "llama3": _LLAMA3,
    "llama3_json": _LLAMA3,
    "llama4_json": _LLAMA3,
    "mistral": _MISTRAL,
    "pythonic": _PYTHONIC,
    "llama4_pythonic": _PYTHONIC,
    "qwen3_coder": _QWEN3_CODER,
    "qwen3_xml": _QWEN3_CODER,
}


def choose(chat_template: str) -> str | None:
    """The name of the family whose format `chat_template` teaches; None unless exactly one of the rules knows it."""
    found = [name for name, matches in _RULES if matches(chat_template)]
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
