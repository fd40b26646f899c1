"""What one chat request says of tools and thoughts, and what follows from it for its prompt, grammar and answers.

Made once for each request, before anything is submitted. Called by `server/chat_job.py`; knows nothing of HTTP.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import msgspec

from multilora.errors import BadRequest
from multilora.front.structural_tag import json_only
from multilora.front.tools.answer import AnswerReader
from multilora.front.tools.definitions import Tool, ToolChoice, parse_tool_choice, parse_tools
from multilora.front.tools.families import FAMILIES, Family, choose, open_parser
from multilora.front.tools.reasoning import REASONING, ReasoningParser
from multilora.front.tools.schema import MAX_WHITESPACE, forced_schema
from multilora.params import SamplingParams

_THINK_TAGS = ("<think>", "</think>")


@dataclass(frozen=True)
class ToolRequest:
    """offered: the tools as the client sent them, for the chat template; None: it sees none.

    family: the format in which the model writes its calls; None: not known, so that calls under "auto" are content.
    reasoning: makes the reasoning parser of one answer from the end of its prompt; None: thoughts are content.
    """

    offered: list[dict[str, Any]] | None
    tools: Sequence[Tool]
    choice: ToolChoice
    parallel: bool
    family: Family | None
    reasoning: Callable[[str], ReasoningParser] | None

    @classmethod
    def parse(
        cls,
        tools: Any,
        tool_choice: Any,
        *,
        parallel: bool,
        chat_template: str,
        tool_call_parser: str | None,
        reasoning_parser: str | None,
    ) -> Self:
        """From the fields of a body and the names of the parsers; a null `tool_call_parser` is chosen from the
        template. Raises BadRequest naming the field."""
        parsed = parse_tools(tools)
        choice = parse_tool_choice(tool_choice, parsed)
        name = tool_call_parser or choose(chat_template)
        return cls(
            offered=_offered(tools, choice),
            tools=parsed,
            choice=choice,
            parallel=parallel,
            family=FAMILIES[name] if name else None,
            reasoning=REASONING[reasoning_parser] if reasoning_parser and not choice.forced else None,
        )

    def constrain(self, sampling: SamplingParams) -> SamplingParams:
        """`sampling` with the grammar of a forced call, or of strict tools; else unchanged. Raises BadRequest."""
        schema = forced_schema(self.choice, self.tools, parallel=self.parallel)
        if schema is not None:
            if sampling.grammar_field is not None:
                message = f"'required' or a named function cannot be combined with {sampling.grammar_field}"
                raise BadRequest(f"tool_choice: {message}, which asks for another grammar", param="tool_choice")
            tag: dict[str, Any] | None = json_only(schema, MAX_WHITESPACE)
        elif self.family is None or self.choice.mode != "auto" or sampling.grammar_field is not None:
            return sampling  # a grammar of the request's own leaves no room for calls
        else:
            tag = self.family.strict_tag(self.tools, parallel=self.parallel)
        return sampling if tag is None else msgspec.structs.replace(sampling, structural_tag=json.dumps(tag))

    @property
    def markers(self) -> tuple[str, ...]:
        """Special tokens that have to stay in the answer's text, because a parser looks for them."""
        calls = self.family.markers if self.family and self.choice.mode == "auto" else ()
        return calls + _THINK_TAGS if self.reasoning else calls

    @property
    def has_parsers(self) -> bool:
        """Whether anything in an answer's text may be more than content."""
        return self.reasoning is not None or open_parser(self.family, self.choice, self.tools) is not None

    def reader(self, prompt_end: Callable[[], str]) -> AnswerReader:
        """The reader of one answer. prompt_end: gives the end of its rendered prompt."""
        reasoning = self.reasoning(prompt_end()) if self.reasoning else None
        return AnswerReader(reasoning, open_parser(self.family, self.choice, self.tools), parallel=self.parallel)


def offered_tools(tools: Any, tool_choice: Any) -> list[dict[str, Any]] | None:
    """The tools that the chat template is shown, as the client sent them; None: none. Raises BadRequest."""
    return _offered(tools, parse_tool_choice(tool_choice, parse_tools(tools)))


def _offered(tools: list[dict[str, Any]] | None, choice: ToolChoice) -> list[dict[str, Any]] | None:
    return None if choice.mode == "none" else tools
