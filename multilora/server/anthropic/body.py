"""The JSON bodies of `/v1/messages` and `/v1/messages/count_tokens`, and their translation into the chat route's.

Knows which field means which; nothing of message blocks or answers.
"""

from typing import Any, Literal

from pydantic import Field

from multilora.errors import BadRequest
from multilora.server.anthropic.messages import chat_messages
from multilora.server.bodies import Body, Integer
from multilora.server.dialects import a_string, an_object, refused
from multilora.server.openai_bodies import ChatBody

WORDS = {
    "sampling_params.stop ": "stop_sequences ",
    "sampling_params.stop:": "stop_sequences:",
    "sampling_params.": "",
    "max_new_tokens": "max_tokens",
    ".function.parameters": ".input_schema",
    ".function.": ".",
    "response_format": "output_config.format",
}
"""The chat route's names of fields, and Anthropic's."""

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Thinking(Body):
    where = "thinking"
    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Body):
    where = "output_config.format"
    type: Literal["json_schema"]
    schema_: dict[str, Any] | bool = Field(alias="schema")


class OutputConfig(Body):
    where = "output_config"
    effort: str | None = None
    format: OutputFormat | None = None


class CountBody(Body):
    """`POST /v1/messages/count_tokens`: what a prompt is made of. messages, system: see `messages.py`."""

    where = "/v1/messages/count_tokens"
    messages: list[Any]
    system: str | list[Any] | None = None
    model: str | None = None
    lora_path: Any = None  # see front/adapter_spec.py
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat_body(self) -> ChatBody:
        """The same request as the chat route has it. Raises BadRequest."""
        messages, prefilled = chat_messages(self.system, self.messages)
        choice = self.tool_choice or {}
        return ChatBody.model_validate(
            {name: getattr(self, name) for name in _same(type(self))}
            | {
                "messages": messages,
                "continue_final_message": prefilled,
                "tools": None
                if self.tools is None
                else [_chat_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools)],
                "tool_choice": _chat_choice(choice) if choice else None,
                "parallel_tool_calls": not choice.get("disable_parallel_tool_use"),
                "chat_template_kwargs": self._template_options(),
                "reasoning_effort": self.output_config.effort if self.output_config else None,
                "response_format": self._response_format(),
            }
            | self._limits()
        )

    def _limits(self) -> dict[str, Any]:
        return {}

    def _template_options(self) -> dict[str, Any] | None:
        """Templates of models that think on demand read `enable_thinking`."""
        if self.thinking is None or self.thinking.type == "adaptive":
            return self.chat_template_kwargs
        return {"enable_thinking": self.thinking.type == "enabled"} | (self.chat_template_kwargs or {})

    def _response_format(self) -> dict[str, Any] | None:
        wanted = self.output_config.format if self.output_config else None
        return {"type": "json_schema", "json_schema": {"schema": wanted.schema_}} if wanted else None


class MessagesBody(CountBody):
    """`POST /v1/messages`."""

    where = "/v1/messages"
    max_tokens: Integer
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    cache_salt: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None

    def _limits(self) -> dict[str, Any]:
        if self.max_tokens < 1:
            raise BadRequest(f"max_tokens = {self.max_tokens}: must be 1 or more", param="max_tokens")
        return {"stop": self.stop_sequences}


def _same(body: type[CountBody]) -> set[str]:
    """The fields that mean the same in both bodies."""
    other = {"messages", "tools", "tool_choice", "chat_template_kwargs", "stream"}
    return (body.model_fields.keys() & ChatBody.model_fields.keys()) - other


def _chat_tool(tool: Any, path: str) -> dict[str, Any]:
    """The tool as chats have it. Tools that Anthropic's servers run are refused by name."""
    tool = an_object(tool, path)
    if tool.get("type") not in (None, "custom"):
        raise refused(f"{path}.type", f"{tool['type']!r:.80}: only tools of the client are served")
    if not isinstance(tool.get("input_schema"), dict):
        raise refused(f"{path}.input_schema", "this object is required")
    function = {key: tool.get(key) for key in ("name", "description", "strict")}
    return {"type": "function", "function": function | {"parameters": tool["input_schema"]}}


def _chat_choice(choice: dict[str, Any]) -> str | dict[str, Any]:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": a_string(choice, "name", "tool_choice")}}
    if kind not in _CHOICES:
        raise refused("tool_choice.type", f"{kind!r:.80} must be one of auto, any, tool, none")
    return _CHOICES[kind]
