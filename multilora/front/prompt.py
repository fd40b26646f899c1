"""Prompts in their forms, and the checks of what depends on the model's context and vocabulary.

Pure functions; raise BadRequest. `generation.py` calls them for every request, through whichever door it came.
"""

import itertools
import json
import reprlib
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import msgspec

from multilora.errors import BadRequest, PromptTooLong
from multilora.front.tools.messages import prepare_messages
from multilora.params import GRAMMAR_FIELDS, SamplingParams

if TYPE_CHECKING:  # transformers and torch, which what reads bodies does without
    from multilora.front.tokenizer import Tokenizer
    from multilora.front.vocabulary import Vocabulary

Ids = TypeVar("Ids", list[int], "array[int]")

MAX_SALT = 1024  # characters
MAX_TIMEOUT = 7 * 24 * 3600  # seconds

MAX_PROMPTS = 4096
"""The bound of the prompts in one request."""
MAX_TRUNCATED = 1 << 20
"""The bound of a text that is tokenized however long it is, in characters."""
MAX_STOP_REGEXES = 8
MAX_STOP_CHARACTERS = 8192
"""The bound of all stop strings of a request together."""


@dataclass(frozen=True)
class Truncation:
    """A prompt of more than `tokens` loses what is over at its end ("right") or its beginning ("left"). side None: as
    the tokenizer has it, and what special tokens it adds to a text stay."""

    tokens: int
    side: Literal["left", "right"] | None = None

    def cut(self, ids: Ids, default: str = "right") -> Ids:
        """default: the side, where there is none."""
        return ids[-self.tokens :] if (self.side or default) == "left" else ids[: self.tokens]


@dataclass(frozen=True)
class TextPrompt:
    """`param`: the client's field that it came in. add_special_tokens: whether the tokenizer adds its own, as BOS.
    truncation: None: a text that is too long is refused."""

    text: str
    param: str
    add_special_tokens: bool = True
    truncation: Truncation | None = None

    @property
    def size(self) -> int:
        """In characters."""
        return len(self.text)

    def encode(self, vocabulary: "Vocabulary", context_length: int) -> list[int]:
        """Raises PromptTooLong, if that is certain, before the text is tokenized."""
        tokenizer, special = vocabulary.writer("text", self.param), self.add_special_tokens
        if self.truncation is None:
            _check_fits(tokenizer, self.text, context_length, self.param)
            return tokenizer.encode(self.text, add_special_tokens=special)
        if len(self.text) > MAX_TRUNCATED:
            raise BadRequest(f"{self.param}: over {MAX_TRUNCATED} characters, to be truncated", param=self.param)
        if self.truncation.side is None:
            return tokenizer.encode_truncated(self.text, self.truncation.tokens, add_special_tokens=special)
        return self.truncation.cut(tokenizer.encode(self.text, add_special_tokens=special))


@dataclass(frozen=True)
class ChatPrompt:
    """Messages for the model's chat template; `options`: further arguments of `Tokenizer.render_chat`. `param`: the
    client's field that they came in."""

    messages: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    param: str = "messages"
    truncation: Truncation | None = None

    def encode(self, vocabulary: "Vocabulary", context_length: int) -> list[int]:
        """As `TextPrompt.encode`; the template is rendered in any case."""
        tokenizer = vocabulary.writer("chat", self.param)
        knows_developer = "developer" in tokenizer.chat_template
        options = dict(self.options)
        special = bool(options.pop("add_special_tokens", False))
        text = tokenizer.render_chat(prepare_messages(self.messages, knows_developer=knows_developer), **options)
        if self.truncation is not None:
            ids = tokenizer.encode_rendered(text, add_special_tokens=special)
            return self.truncation.cut(ids, tokenizer.hf.truncation_side)
        _check_fits(tokenizer, text, context_length, self.param)
        return tokenizer.encode_rendered(text, add_special_tokens=special)


@dataclass(frozen=True)
class PairPrompt:
    """Two texts as one prompt, joined as the tokenizer joins a pair. `param`: the client's field of the second."""

    text: str
    second: str
    param: str
    truncation: Truncation | None = None

    @property
    def size(self) -> int:
        """In characters."""
        return len(self.text) + len(self.second)

    def encode(self, vocabulary: "Vocabulary", context_length: int) -> list[int]:
        """As `TextPrompt.encode`. Truncation takes tokens of the longer text first, as transformers does."""
        tokenizer = vocabulary.writer("text", self.param)
        if self.truncation is None:
            _check_fits(tokenizer, self.text + self.second, context_length, self.param)
            return tokenizer.encode_pair(self.text, self.second)
        if self.size > MAX_TRUNCATED:
            raise BadRequest(f"{self.param}: over {MAX_TRUNCATED} characters, to be truncated", param=self.param)
        if self.truncation.side is None:
            return tokenizer.encode_pair(self.text, self.second, self.truncation.tokens)
        return self.truncation.cut(tokenizer.encode_pair(self.text, self.second))


Prompt: TypeAlias = "TextPrompt | ChatPrompt | PairPrompt | list[int] | array[int]"
"""An array has many token ids, in 64 bits each: a list is only made of those that fit the context."""


def encode(
    prompt: Prompt, vocabulary: "Vocabulary", context_length: int, param: str, *, answered: bool, padded: bool = False
) -> list[int]:
    """Return the token ids of a prompt. Raises PromptTooLong where that is certain before they are made; the other
    arguments are those of `check_prompt`. padded: padding may still be taken from it."""
    if isinstance(prompt, array):
        if not padded:
            check_length(len(prompt), context_length, param, answered=answered)
        return prompt.tolist()
    return prompt if isinstance(prompt, list) else prompt.encode(vocabulary, context_length)


def truncated(prompt: Prompt, truncation: Truncation | None) -> Prompt:
    """The same prompt, to be cut if it is too long."""
    if truncation is None:
        return prompt
    if isinstance(prompt, list):
        return truncation.cut(prompt)
    if isinstance(prompt, array):
        return truncation.cut(prompt)
    return replace(prompt, truncation=truncation)


def read_prompts(given: Any, param: str) -> tuple[list[Prompt], bool]:
    """One prompt (text or token ids) or several of them, and whether several were asked for."""
    if isinstance(given, array) and given.typecode != "q":
        given = given.tolist()
    if isinstance(given, str | array) or not isinstance(given, Iterable):
        return [read_prompt(given, param)], False
    items = list(given)
    if not items:
        raise BadRequest(f"{param}: no prompts, the list is empty", param=param)
    if len(items) > MAX_PROMPTS and type(items[0]) is not int:
        raise BadRequest(
            f"{param}: {len(items)} prompts in one request, at most {MAX_PROMPTS} are taken", param=param
        )
    if not isinstance(items[0], str | list | tuple | array):
        return [read_prompt(items, param)], False
    return [read_prompt(item, param) for item in items], True


def read_prompt(given: Any, param: str) -> Prompt:
    """Text, or a list of token ids; bools and numpy's numbers are no token ids."""
    if isinstance(given, str):
        return TextPrompt(given, param)
    if isinstance(given, array):
        return given if given.typecode == "q" else read_prompt(given.tolist(), param)
    if not isinstance(given, list | tuple) or not set(map(type, given)) <= {int}:
        raise _no_prompt(given, param)
    return list(given)


def _no_prompt(given: Any, param: str) -> BadRequest:
    return BadRequest(f"{param}: a prompt is text or a list of token ids, not {reprlib.repr(given):.40}", param=param)


def spread(value: Any, count: int, name: str) -> list[Any]:
    """One value per prompt: a list has one entry for each, anything else is for all."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise BadRequest(f"{name} has {len(value)} entries for {count} inputs", param=name)
    return list(value)


def check_prompt(
    ids: Sequence[int], context_length: int, vocab_size: int, param: str, *, answered: bool = True
) -> None:
    """Raise BadRequest, naming the field `param`, unless every id is in the vocabulary and one new token fits the
    context, if it is to be answered."""
    if not ids:
        raise BadRequest("the prompt is empty: it needs at least one token", param=param)
    check_length(len(ids), context_length, param, answered=answered)
    outside = [i for i in (min(ids), max(ids)) if not 0 <= i < vocab_size]
    if outside:
        raise BadRequest(
            f"{param}: token id {outside[0]} is outside the vocabulary of {vocab_size} tokens", param=param
        )


def check_length(tokens: int, context_length: int, param: str, *, answered: bool) -> None:
    """Raise PromptTooLong for a prompt of so many tokens, unless it fits the context, with one new one if it is to
    be answered."""
    if tokens > context_length and not answered:
        raise PromptTooLong(
            f"This model's maximum context length is {context_length} tokens. However, you requested {tokens} "
            "tokens in the input. Please shorten it.",
            param=param,
        )
    if tokens >= context_length and answered:
        raise _too_long(context_length, f"{tokens + 1}", f"{tokens}", param)


def _check_fits(tokenizer: "Tokenizer", text: str, context_length: int, param: str) -> None:
    """Raise PromptTooLong for a text that has more tokens than the context, whatever they are."""
    longest = tokenizer.most_bytes_per_token
    least = 0 if longest is None else len(text.encode(errors="replace")) // longest
    if least > context_length:
        raise _too_long(context_length, f"at least {least + 1}", f"{least} or more", param)


def _too_long(context_length: int, requested: str, prompt: str, param: str) -> PromptTooLong:
    """In the words of vLLM, which clients look for."""
    return PromptTooLong(
        f"This model's maximum context length is {context_length} tokens. However, you requested {requested} "
        f"tokens ({prompt} in the prompt, at least 1 in the completion). Please shorten the prompt.",
        param=param,
    )


def check_stops(params: SamplingParams, most: int) -> None:
    """Raise BadRequest for more stop strings and expressions than `most`, or longer ones than are searched for."""
    strings, regexes = params.stop_strings, params.stop_regexes
    if len(strings) + len(regexes) > most:
        raise BadRequest(
            f"sampling_params.stop: {len(strings) + len(regexes)} stop strings and expressions, at most {most} are "
            "searched for (--max-stop-strings)",
            param="stop",
        )
    if len(regexes) > MAX_STOP_REGEXES:
        raise BadRequest(
            f"sampling_params.stop_regex: {len(regexes)} expressions, at most {MAX_STOP_REGEXES} are searched for",
            param="stop_regex",
        )
    if sum(map(len, strings)) > MAX_STOP_CHARACTERS:
        raise BadRequest(
            f"sampling_params.stop: over {MAX_STOP_CHARACTERS} characters in all stop strings together", param="stop"
        )


def prefix_salt(cache_salt: Any, extra_key: Any) -> str:
    """What keeps a request's cached prefixes apart from those of other salts: vLLM's `cache_salt` and SGLang's
    `extra_key`, which are never taken for each other. Null and "" are no salt. Raises BadRequest."""
    for param, value in (("cache_salt", cache_salt), ("extra_key", extra_key)):
        if value is not None and not isinstance(value, str):
            raise BadRequest(f"{param} = {value!r:.40}: must be text", param=param)
        if value is not None and len(value) > MAX_SALT:
            raise BadRequest(f"{param}: {len(value)} characters; at most {MAX_SALT} are served", param=param)
    return json.dumps([cache_salt or "", extra_key or ""]) if cache_salt or extra_key else ""


def tenant_salt(tenant: str, salt: str) -> str:
    """The salt of a tenant's request: tenants share no cached prefixes, or the time of an answer would tell one what
    others have asked. No tenant's name begins as a salt does, and none has a line's end."""
    return f"{tenant}\n{salt}" if tenant else salt


def check_priority(priority: int | None) -> int:
    """The priority of a request; null is 0. Raises BadRequest."""
    if priority is not None and abs(priority) >= 2**63:
        raise BadRequest(f"priority = {priority}: must be a 64-bit integer", param="priority")
    return priority or 0


def check_timeout(seconds: float | None) -> float | None:
    """How long a request may take at most; null: as long as it needs. Raises BadRequest."""
    if seconds is not None and not 0 < seconds <= MAX_TIMEOUT:  # which NaN is not either
        raise BadRequest(f"timeout = {seconds}: must be over 0 and at most {MAX_TIMEOUT} seconds", param="timeout")
    return seconds


def deadline(timeout: float | None, longest: float | None) -> float | None:
    """When a request that comes now ends, in monotonic seconds: the sooner of both limits, in seconds from now."""
    limits = [seconds for seconds in (timeout, longest) if seconds is not None]
    return time.monotonic() + min(limits) if limits else None


def check_logprobs(start_len: int, top_num: int, prompt_tokens: int, most: int, of_prompt: int | None = None) -> None:
    """Raise BadRequest unless the logprobs asked for exist. start_len: -1 is none of the prompt; most: alternatives
    to a token."""
    if not -1 <= start_len <= prompt_tokens:
        raise BadRequest(
            f"logprob_start_len = {start_len}: the prompt has {prompt_tokens} tokens", param="logprob_start_len"
        )
    if not 0 <= top_num <= most:
        raise BadRequest(
            f"top_logprobs_num = {top_num}: must be 0 to {most} (--max-logprobs)", param="top_logprobs_num"
        )
    if of_prompt is not None and not 0 <= of_prompt <= most:
        raise BadRequest(
            f"prompt_logprobs = {of_prompt}: must be 0 to {most} (--max-logprobs)", param="prompt_logprobs"
        )


def engine_params(
    params: SamplingParams,
    prompt_tokens: int,
    context_length: int,
    vocab_size: int,
    *,
    sample: int = 0,
    ends: Sequence[int] = (),
) -> SamplingParams:
    """What the engine needs of `params` for sample number `sample` of `n`. Raises BadRequest.

    Limits are clamped to the context. Text (stop strings, grammar source) is left out, as it stays in the front.
    ends: ids that end this answer as the model's EOS does.
    """
    for token in itertools.chain(params.stop_token_ids or (), map(int, params.logit_bias or ())):
        if token >= vocab_size:
            name = "stop_token_ids" if token in (params.stop_token_ids or ()) else "logit_bias"
            raise BadRequest(
                f"sampling_params.{name}: token id {token} is outside the vocabulary of {vocab_size} tokens",
                param=name,
            )
    room = context_length - prompt_tokens
    limit = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
    seed = params.sampling_seed
    stops = params.stop_token_ids
    if ends and not params.ignore_eos:
        stops = [*(stops or ()), *ends]
    return msgspec.structs.replace(
        params,
        max_new_tokens=limit,
        min_new_tokens=min(params.min_new_tokens, limit),
        sampling_seed=None if seed is None else _wrap_int64(seed + sample),
        n=1,
        stop_token_ids=stops,
        stop=None,
        stop_regex=None,
        **dict.fromkeys(GRAMMAR_FIELDS),
    )


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
