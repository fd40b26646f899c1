"""The JSON bodies of `/v1/completions` and `/v1/chat/completions`, with SGLang's and vLLM's extra fields.

Fields of OpenAI's documentation that cannot change the answer here are accepted and ignored; those that would have
to change it (audio, functions, …) are refused by name unless empty. Unknown fields are refused.
Knows which field means which sampling parameter; nothing of prompts, adapters or answers.
"""

import json
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from multilora.errors import BadRequest
from multilora.params import SamplingParams
from multilora.server.bodies import Body, Prompts, Texts, TokenIds, words

_IGNORED = words(
    """user store metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention
    prompt_cache_options verbosity priority request_id stream_reasoning reasoning_effort
    include_reasoning return_cached_tokens_details custom_labels"""
)
_UNSERVED = words(
    """audio functions function_call modalities prediction suffix web_search_options moderation use_beam_search
    length_penalty prompt_logprobs truncate_prompt_tokens allowed_token_ids bad_words return_hidden_states
    return_token_ids return_routed_experts custom_logit_processor custom_params session_params data_parallel_rank
    chat_template documents mm_processor_kwargs kv_transfer_params lora_id extra_key"""
)
_SAMPLING = words(
    """temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty stop stop_token_ids
    stop_regex ignore_eos skip_special_tokens spaces_between_special_tokens no_stop_trim logit_bias regex ebnf"""
)


class StreamOptions(Body):
    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})
    unserved: ClassVar[frozenset[str]] = frozenset({"continuous_usage_stats"})
    include_usage: bool | None = None


class JsonSchema(Body):
    ignored: ClassVar[frozenset[str]] = frozenset({"name", "description", "strict"})
    schema_: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_text(self) -> str | None:
        """The JSON schema that the answer has to follow, as text. None: any text will do."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return '{"type": "object"}'
        if self.json_schema is None:
            raise BadRequest("response_format.json_schema: this field is required", param="response_format")
        return json.dumps(self.json_schema.schema_)


class OpenAIBody(Body):
    """What both routes share."""

    ignored: ClassVar[frozenset[str]] = _IGNORED
    unserved: ClassVar[frozenset[str]] = _UNSERVED
    model: str
    lora_path: Any = None  # see front/adapter_spec.py
    rid: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: str | list[str] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[str, float] | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None

    @property
    def include_usage(self) -> bool:
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options: only allowed together with stream", param="stream_options")
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, defaults: dict[str, Any], max_new_tokens: int | None) -> SamplingParams:
        """The sampling parameters: what the body gives, over `defaults`. Raises BadRequest naming the field."""
        fields = defaults | {"max_new_tokens": max_new_tokens}
        fields |= {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        if self.seed is not None:
            fields["sampling_seed"] = self.seed
        if self.n is not None:
            fields["n"] = self.n
        if self.min_tokens is not None:
            fields["min_new_tokens"] = self.min_tokens
        if self.include_stop_str_in_output:
            fields["no_stop_trim"] = True
        schema = self.response_format.schema_text() if self.response_format else None
        if schema is not None and self.json_schema is not None:
            raise BadRequest("only one of response_format and json_schema can be given", param="response_format")
        if schema is not None or self.json_schema is not None:
            fields["json_schema"] = schema if schema is not None else self.json_schema
        return SamplingParams.parse(fields)


class CompletionBody(OpenAIBody):
    """`POST /v1/completions`. `max_tokens` defaults to 16, as OpenAI's."""

    prompt: str | Texts | TokenIds | Prompts
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None


class ChatMessage(BaseModel):
    """One message, with all that the client says of it: `front.tools.messages` checks and prepares it."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(OpenAIBody):
    """`POST /v1/chat/completions`. Without a limit the answer may fill the context."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None  # see front/tools/definitions.py, as for tool_choice
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
