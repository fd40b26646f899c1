"""The JSON bodies of the routes that read prompts instead of answering them, and what all of them have in common.

Knows which field means what; nothing of engines or of answers.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from multilora.errors import BadRequest
from multilora.front.prompt import (
    Prompt,
    TextPrompt,
    Truncation,
    prefix_salt,
    read_prompts,
    spread,
    truncated,
)
from multilora.front.scoring import TextPairs
from multilora.server.bodies import Body, Integer, Prompts, Texts, TokenIds
from multilora.server.chat_job import chat_prompt
from multilora.server.openai_bodies import ChatMessage, Conversation

SIDES: dict[str, Literal["left", "right"]] = {"left": "left", "right": "right"}


class ReadBody(Body):
    """What every one of these bodies has."""

    model: str | None = None
    lora_path: Any = None  # see front/adapter_spec.py
    rid: str | list[str] | None = None
    priority: Integer | None = None
    timeout: float | None = None
    cache_salt: Any = None  # see front.prompt.prefix_salt; a list has one for each prompt, as for extra_key
    extra_key: Any = None
    truncate_prompt_tokens: Integer | None = None
    truncation_side: str | None = None
    padding: str | None = None

    def truncation(self, context_length: int) -> Truncation | None:
        """What becomes of prompts that are too long; None: they are refused. Raises BadRequest."""
        most, given = self.truncate_prompt_tokens, self.truncation_side
        if given is not None and given not in SIDES:
            raise BadRequest(f"truncation_side = {given!r:.40}: must be left or right", param="truncation_side")
        if self.padding not in (None, "do_not_pad"):
            raise BadRequest(f"padding = {self.padding!r:.40}: prompts are not padded here", param="padding")
        if most is None:
            return None
        if not (most == -1 or 1 <= most <= context_length):
            raise BadRequest(
                f"truncate_prompt_tokens = {most}: must be 1 to {context_length}, the context, or -1 for that",
                param="truncate_prompt_tokens",
            )
        return Truncation(context_length if most == -1 else most, None if given is None else SIDES[given])

    def salts(self, prompts: int) -> list[str]:
        """The salt of each prompt's cached prefixes. Raises BadRequest."""
        salts, keys = spread(self.cache_salt, prompts, "cache_salt"), spread(self.extra_key, prompts, "extra_key")
        return [prefix_salt(*pair) for pair in zip(salts, keys, strict=True)]

    def rids(self, count: int, *, several: bool) -> list[str] | None:
        """One for each prompt: `#` and its number tell apart those that one rid is given for. Raises BadRequest."""
        if self.rid is None:
            return None
        if isinstance(self.rid, str):
            return [f"{self.rid}#{i}" for i in range(count)] if several else [self.rid]
        return spread(self.rid, count, "rid")


class InputBody(ReadBody):
    """Exactly one of `input` (text, token ids, or a list of either) and `messages` (a conversation), as vLLM."""

    prompt_fields: ClassVar[tuple[str, ...]] = ("input",)
    input: str | Texts | TokenIds | Prompts | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    use_activation: bool | None = None

    def prompts(self, context_length: int) -> tuple[list[Prompt], bool]:
        """The prompts, and whether a list of them was given. Raises BadRequest."""
        if (self.input is None) == (self.messages is None):
            raise BadRequest("exactly one of input and messages must be given", param="input")
        cut = self.truncation(context_length)
        if self.messages is not None:
            return [truncated(self._chat(self.messages), cut)], False
        given, several = read_prompts(self.input, "input")
        if self.add_special_tokens is False:
            given = [TextPrompt(p.text, p.param, False) if isinstance(p, TextPrompt) else p for p in given]
        return [truncated(prompt, cut) for prompt in given], several

    def _chat(self, messages: list[ChatMessage]) -> Prompt:
        """Unlike a chat's, it does not end with the beginning of an answer unless that is asked for."""
        conversation = Conversation.model_construct(
            add_generation_prompt=bool(self.add_generation_prompt),
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        return chat_prompt(conversation, messages, None, special=bool(self.add_special_tokens))


class EmbeddingsBody(InputBody):
    """`POST /v1/embeddings`."""

    where = "/v1/embeddings"
    encoding_format: str | None = None
    dimensions: Integer | None = None

    @property
    def as_base64(self) -> bool:
        """Whether numbers are written as base64 of float32, little-endian. Raises BadRequest."""
        if self.encoding_format not in (None, "float", "base64"):
            what = f"encoding_format = {self.encoding_format!r:.40}: must be float or base64"
            raise BadRequest(what, param="encoding_format")
        return self.encoding_format == "base64"


class NativeReadBody(ReadBody):
    """Exactly one of `text` and `input_ids`; a list is a batch, as in SGLang's native routes."""

    prompt_fields: ClassVar[tuple[str, ...]] = ("input_ids",)
    text: str | Texts | None = None
    input_ids: TokenIds | Prompts | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any] | None] | None = None  # SGLang's has it, without effect

    def native_prompts(self, context_length: int) -> tuple[list[Prompt], bool]:
        """The prompts, and whether a list of them was given. Raises BadRequest."""
        if (self.text is None) == (self.input_ids is None):
            raise BadRequest("exactly one of text and input_ids must be given", param="text")
        given, several = (
            read_prompts(self.text, "text") if self.text is not None else read_prompts(self.input_ids, "input_ids")
        )
        cut = self.truncation(context_length)
        return [truncated(prompt, cut) for prompt in given], several


class EncodeBody(NativeReadBody):
    """`POST /encode`, as SGLang."""

    where = "/encode"
    dimensions: Integer | None = None


class ClassifyBody(NativeReadBody, InputBody):
    """`POST /classify` and `POST /v1/classify`: vLLM's body, or that of SGLang's native route."""

    where = "/classify"
    prompt_fields = ("input", "input_ids")

    @property
    def is_native(self) -> bool:
        """Whether it is SGLang's. Raises BadRequest for a mixture."""
        native = self.text is not None or self.input_ids is not None
        if native and (self.input is not None or self.messages is not None):
            raise BadRequest("exactly one of input, messages, text and input_ids must be given", param="input")
        return native


class RerankDocument(Body):
    """A document as Jina's and Cohere's clients may write it."""

    where = "documents"
    text: str


class PairsBody(ReadBody):
    """What bodies about pairs of texts have in common."""

    use_activation: bool | None = None


class ScoreBody(PairsBody):
    """`POST /v1/score` and `POST /score`, as vLLM: one or more texts, and one or more to compare each with, under one
    of four pairs of names."""

    where = "/v1/score"
    text_1: str | Texts | None = None
    text_2: str | Texts | None = None
    queries: str | Texts | None = None
    documents: str | Texts | None = None
    items: str | Texts | None = None
    data_1: str | Texts | None = None
    data_2: str | Texts | None = None

    def pairs(self) -> TextPairs:
        """Raises BadRequest unless exactly one pair of names is given, and the lengths fit."""
        names = [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
        given = {name for pair in names for name in pair if getattr(self, name) is not None}
        params = next((pair for pair in names if set(pair) == given), None)
        if params is None:
            raise BadRequest("exactly text_1 and text_2, or queries and documents, must be given", param="text_1")
        return TextPairs(_listed(getattr(self, params[0])), _listed(getattr(self, params[1])), params)


class RerankBody(PairsBody):
    """`POST /v1/rerank`, `/v2/rerank` and `/rerank`, as Jina, Cohere and vLLM."""

    where = "/v1/rerank"
    query: str
    documents: Annotated[list[str | RerankDocument], Field(fail_fast=True)]
    top_n: Integer | None = None
    return_documents: bool | None = None

    @property
    def texts(self) -> list[str]:
        """The texts of the documents."""
        return [one if isinstance(one, str) else one.text for one in self.documents]

    def pairs(self) -> TextPairs:
        """Raises BadRequest."""
        return TextPairs([self.query], self.texts, ("query", "documents"))

    @property
    def most(self) -> int | None:
        """How many documents are wanted; None: all. Raises BadRequest."""
        if self.top_n is not None and self.top_n < 0:
            raise BadRequest(f"top_n = {self.top_n}: must be 1 or more, or 0 for all", param="top_n")
        return self.top_n or None


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts
