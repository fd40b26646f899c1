"""The JSON body of `POST /v1/responses`, and its translation into the chat route's.

Knows which field means which; nothing of input items, answers or stored responses.
"""

from typing import Any, Literal

from pydantic import Field

from multilora.errors import BadRequest
from multilora.server.bodies import Body, Integer
from multilora.server.openai_bodies import ChatBody

LOGPROBS = "message.output_text.logprobs"

WORDS = {
    ".function.": ".",
    "sampling_params.": "",
    "max_new_tokens": "max_output_tokens",
    "sampling_seed": "seed",
    "response_format": "text.format",
}
"""The chat route's names of fields, and the Responses API's."""


class ReasoningOptions(Body):
    where = "reasoning"
    effort: str | None = None


class TextFormat(Body):
    where = "text.format"
    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class TextOptions(Body):
    where = "text"
    format: TextFormat | None = None


class ResponsesStreamOptions(Body):
    where = "stream_options"


class ResponsesBody(Body):
    """`POST /v1/responses`, with vLLM's extra fields. input: see `items.py`; tools, tool_choice: as in chats."""

    where = "/v1/responses"
    input: str | list[Any]
    model: str | None = None
    lora_path: Any = None  # see front/adapter_spec.py
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    include: (
        list[
            Literal[
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "code_interpreter_call.outputs",
                "computer_call_output.output.image_url",
                "message.input_image.image_url",
            ]
        ]
        | None
    ) = None
    metadata: dict[str, str] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    max_output_tokens: Integer | None = None
    top_logprobs: Integer | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Integer | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Integer] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[str, float] | None = None

    def check(self) -> None:
        """Raise BadRequest for fields that contradict each other."""
        if self.background and self.store is False:
            raise BadRequest("background: needs store, or nobody could read the response", param="background")

    def chat_body(self, messages: list[dict[str, Any]]) -> ChatBody:
        """The same request as the chat route has it, over all messages of the conversation. Raises BadRequest."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in _SAME}
        if self.instructions is not None:
            messages = [{"role": "system", "content": self.instructions}, *messages]
        return ChatBody.model_validate(
            fields
            | {
                "messages": messages,
                "tools": None if self.tools is None else [_chat_tool(tool) for tool in self.tools],
                "max_tokens": self.max_output_tokens,
                "reasoning_effort": self.reasoning.effort if self.reasoning else None,
                "logprobs": LOGPROBS in (self.include or ()) or bool(self.top_logprobs),
                "response_format": self._response_format(),
            }
        )

    def _response_format(self) -> dict[str, Any] | None:
        wanted = self.text.format if self.text else None
        if wanted is None:
            return None
        if wanted.type != "json_schema":
            return {"type": wanted.type}
        if wanted.schema_ is None:
            raise BadRequest("text.format.schema: this field is required", param="text.format.schema")
        return {"type": "json_schema", "json_schema": {"schema": wanted.schema_}}


_SAME = (ResponsesBody.model_fields.keys() & ChatBody.model_fields.keys()) - {"stream", "stream_options", "tools"}
"""The fields that mean the same in both bodies."""


def _chat_tool(tool: Any) -> Any:
    """A function as chats have it; what is none stays as it is, to be refused by name."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
