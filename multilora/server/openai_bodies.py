"""The JSON bodies of `/v1/completions` and `/v1/chat/completions`, with SGLang's and vLLM's extra fields.

Knows which field means which sampling parameter; nothing of prompts, adapters or answers.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from multilora.errors import BadRequest
from multilora.front.prompt import prefix_salt, spread
from multilora.params import GRAMMAR_FIELDS, SamplingParams
from multilora.server.bodies import Body, Integer, Prompts, Texts, TokenIds
from multilora.server.constraints import GuidedFields

SAMPLING_WORDS = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
"""Names of sampling parameters, and the OpenAI routes'."""

_SAMPLING = frozenset(SamplingParams.__struct_fields__) - {*GRAMMAR_FIELDS}


class StreamOptions(Body):
    where = "stream_options"
    continuous_usage_stats: bool | None = None
    include_usage: bool | None = None


class OpenAIBody(GuidedFields):
    """What both routes share."""

    model: str | None = None
    lora_path: Any = None  # see front/adapter_spec.py
    rid: str | None = None
    n: Integer | None = None
    max_tokens: Integer | None = None
    min_tokens: Integer | None = None
    seed: Integer | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_weight_versions: bool | None = None
    prompt_logprobs: Integer | None = None
    logprobs_mode: Any = None  # see params.parse_logprobs_mode
    cache_salt: Any = None  # see front.prompt.prefix_salt; a list has one for each prompt, as for extra_key
    extra_key: Any = None
    priority: Integer | None = None
    timeout: float | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | Texts | None = None
    stop_token_ids: TokenIds | None = None
    stop_regex: str | Texts | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def include_usage(self) -> bool:
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options: only allowed together with stream", param="stream_options")
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk of a stream has usage counts; as in vLLM, only together with `include_usage`."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling(self, defaults: dict[str, Any], max_new_tokens: Integer | None) -> SamplingParams:
        """The sampling parameters: what the body gives, over `defaults`. Raises BadRequest naming the field."""
        fields = defaults | {"max_new_tokens": max_new_tokens}
        own = _SAMPLING & type(self).model_fields.keys()
        fields |= {name: value for name in own if (value := getattr(self, name)) is not None}
        if self.seed is not None:
            fields["sampling_seed"] = self.seed
        if self.min_tokens is not None:
            fields["min_new_tokens"] = self.min_tokens
        if self.include_stop_str_in_output:
            fields["no_stop_trim"] = True
        if (constraint := self.constraint()) is not None:
            _, parameter, source = constraint
            fields[parameter] = source
        return SamplingParams.parse(fields)

    @property
    def words(self) -> dict[str, str]:
        """The names of sampling parameters in errors, and of the fields that set them."""
        return {"sampling_params.": ""} | SAMPLING_WORDS

    def salts(self, prompts: int) -> list[str]:
        """The salt of each prompt's cached prefixes. Raises BadRequest."""
        salts, keys = spread(self.cache_salt, prompts, "cache_salt"), spread(self.extra_key, prompts, "extra_key")
        return [prefix_salt(*pair) for pair in zip(salts, keys, strict=True)]


class CompletionBody(OpenAIBody):
    """`POST /v1/completions`. `max_tokens` defaults to 16, as OpenAI's."""

    where = "/v1/completions"
    prompt_fields = ("prompt",)
    prompt: str | Texts | TokenIds | Prompts
    logprobs: bool | Integer | None = None
    best_of: Integer | None = None

    @property
    def top_logprobs(self) -> int | None:
        """Alternatives for each token; None: no logprobs at all. `true` asks for one."""
        return None if self.logprobs is None or self.logprobs is False else int(self.logprobs)


MAX_MESSAGES = 8192
"""Messages of one conversation. To read more takes so long that others notice."""


class ChatMessage(BaseModel):
    """One message, with all that the client says of it: `front.tools.messages` checks and prepares it."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None


class Conversation(Body):
    """What the chat template makes a prompt of."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: Any = None  # see front/tools/definitions.py, as for tool_choice
    tool_choice: Any = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatBody(Conversation, OpenAIBody):
    """`POST /v1/chat/completions`. Without a limit the answer may fill the context."""

    where = "/v1/chat/completions"
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: Integer | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None

    @property
    def words(self) -> dict[str, str]:
        newer = {} if self.max_completion_tokens is None else {"max_new_tokens": "max_completion_tokens"}
        return super().words | newer
