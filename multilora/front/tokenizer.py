"""The tokenizer: text to ids and back, chat templates.

Owns the transformers tokenizer and the facts that the streaming detokenizer needs of it. Knows nothing of requests,
models or HTTP. Encoding is safe in several threads at once, and lets others run meanwhile.
"""

import inspect
import json
import os
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
from tokenizers.decoders import ByteLevel

from multilora.config import Config
from multilora.demo import base_model_path
from multilora.errors import BadRequest, ConfigError
from multilora.front.tokenizer_length import shrinking

if TYPE_CHECKING:  # imported where used, as it takes seconds and brings torch: what reads bodies does without
    from transformers import PreTrainedTokenizerFast

_ENCODERS = ("encode", "_encode_plus")  # methods of transformers' tokenizers

# what a template, run over a client's messages, may raise
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


Step = int | tuple[int, int]
"""A token, behind any other or behind this one (-1: the first of its text)."""
MAX_STEPS = 1 << 16


class Tokenizer:
    """eos_token_id: the tokenizer's own (a model may have more); vocab_size: with added tokens;
    special_ids: what `skip_special_tokens` leaves out; steps: what detokenizers have learnt, without and with spaces
    between special tokens; context_free: a token that is whole characters has the same text behind any other."""

    def __init__(self, hf: "PreTrainedTokenizerFast"):
        from transformers import PreTrainedTokenizerFast

        self.hf = hf
        self.eos_token_id: int | None = hf.eos_token_id
        self.vocab_size: int = len(hf)
        self._special = {token.content: i for i, token in hf.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(self._special.values())
        self._token_texts: dict[int, str] = {}
        self.steps: tuple[dict[Step, str], dict[Step, str]] = ({}, {})
        self._fast = all(getattr(type(hf), f) is getattr(PreTrainedTokenizerFast, f) for f in _ENCODERS)
        backend = hf.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = hf.split_special_tokens
        self.context_free = isinstance(backend.decoder, ByteLevel)
        self._reserved = frozenset(inspect.signature(hf.apply_chat_template).parameters) - {"documents"}

    @classmethod
    def of(cls, config: Config) -> "Tokenizer | None":
        """The base model's; None with --skip-tokenizer-init. Raises ConfigError."""
        if config.skip_tokenizer_init:
            return None
        return cls.load(
            config.tokenizer_path or config.model_path or str(base_model_path()),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            chat_template=config.chat_template,
        )

    @classmethod
    def load(
        cls,
        path: str,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
    ) -> "Tokenizer":
        """From a directory or a hub id; `chat_template`: a file, or the template itself. Raises ConfigError."""
        from transformers import AutoTokenizer

        try:
            hf = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError) as e:
            raise ConfigError(f"no tokenizer could be loaded from {path!r}: {e}") from e
        if not hf.is_fast:
            raise ConfigError(f"the tokenizer of {path!r} ({type(hf).__name__}) has no fast version (tokenizer.json)")
        if chat_template is not None:
            hf.chat_template = _read_template(chat_template)
        return cls(hf)

    @property
    def chat_template(self) -> str:
        """The template, of several the one for conversations with tools; "": the model has none."""
        template = self.hf.chat_template or ""
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default") or ""
        return str(template)

    @cached_property
    def most_bytes_per_token(self) -> int | None:
        """No text has fewer tokens than its UTF-8 bytes divided by this; None: nothing of that kind is known."""
        longest = max(len(token.encode()) for token in self.hf.get_vocab())
        shrinks = shrinking(json.loads(self.hf.backend_tokenizer.to_str()))
        return None if shrinks is None else longest * shrinks

    def info(self) -> dict[str, Any]:
        """What `tokenizer_config.json` holds, as JSON values, without the paths of files."""
        found = {k: v for k, v in self.hf.init_kwargs.items() if not k.endswith(("_file", "_path"))}
        plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
        return plain | {"tokenizer_class": type(self.hf).__name__, "chat_template": self.chat_template or None}

    def special_ids_of(self, texts: Iterable[str]) -> frozenset[int]:
        """Ids of the special tokens among `texts`."""
        return frozenset(self._special[text] for text in texts if text in self._special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """With the special tokens that the tokenizer adds; a BOS that the text itself begins with is not doubled."""
        ids = self._encode(text, add_special_tokens)
        bos = self.hf.bos_token_id
        if bos is not None and ids[:2] == [bos, bos] and text.startswith(self.hf.bos_token):
            return ids[1:]
        return ids

    def encode_truncated(self, text: str, limit: int, *, add_special_tokens: bool = True) -> list[int]:
        """`encode`, and of a longer text no more than `limit` tokens, from the tokenizer's own side: as transformers
        truncates, so that the special tokens which the tokenizer adds are all there."""
        ids = self.encode(text, add_special_tokens=add_special_tokens)
        if len(ids) <= limit:
            return ids
        side, backend = self.hf.truncation_side, self.hf.backend_tokenizer
        if not self._fast:
            return ids[:limit] if side == "right" else ids[-limit:]
        added = backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        encoding = backend.encode(text, add_special_tokens=False)
        encoding.truncate(max(0, limit - added), direction=side)
        whole: list[int] = backend.post_process(encoding, None, add_special_tokens).ids
        return whole[:limit]

    def encode_pair(self, first: str, second: str, limit: int | None = None) -> list[int]:
        """Two texts as one, with the special tokens that the tokenizer puts around and between them. Of more than
        `limit` tokens, those at the end of the longer text go first."""
        if not self._fast:
            own: list[int] = self.hf(first, second)["input_ids"]
            return own if limit is None else own[:limit]
        backend = self.hf.backend_tokenizer
        one, other = (backend.encode(text, add_special_tokens=False) for text in (first, second))
        if limit is not None:
            room = max(0, limit - backend.num_special_tokens_to_add(True))
            sizes = shared_room(len(one.ids), len(other.ids), room)
            for encoding, size in zip((one, other), sizes, strict=True):
                encoding.truncate(size, direction=self.hf.truncation_side)
        whole: list[int] = backend.post_process(one, other, True).ids
        return whole if limit is None else whole[:limit]

    def encode_chat(
        self, messages: list[dict[str, Any]], *, add_special_tokens: bool = False, **options: Any
    ) -> list[int]:
        """`render_chat`, then `encode_rendered`. Raises BadRequest."""
        return self.encode_rendered(self.render_chat(messages, **options), add_special_tokens=add_special_tokens)

    def encode_rendered(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """What `render_chat` made of a conversation as tokens. The template writes its own special tokens: with
        `add_special_tokens` the tokenizer adds those that it adds to any text."""
        return self._encode(text, add_special_tokens)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The conversation as the chat template writes it. Raises BadRequest."""
        if not self.hf.chat_template:
            raise BadRequest("the model has no chat template; start with --chat-template or use completions")
        if reserved := self._reserved & set(template_kwargs):
            raise BadRequest(f"{sorted(reserved)[0]!r} cannot be given to the chat template")
        try:
            text: str = self.hf.apply_chat_template(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **template_kwargs,
            )
        except _TEMPLATE_ERRORS as e:
            raise BadRequest(f"the chat template refused the messages: {e}", param="messages") from e
        return text

    def _encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """As `self.hf.encode`; straight from its backend in half the time, where its class adds nothing."""
        if self._fast:
            [encoding] = self.hf.backend_tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
            return ids
        own: list[int] = self.hf.encode(text, add_special_tokens=add_special_tokens)
        return own

    def decode(
        self, ids: list[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """Exactly the tokens' text, spaces as they are (fast tokenizers put none between special tokens)."""
        text: str = self.hf.decode(
            ids,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text

    def token_text(self, token_id: int) -> str:
        """The token's text within a text (with the space that some tokenizers drop at the beginning of one)."""
        text = self._token_texts.get(token_id)
        if text is None:
            alone = self.decode([token_id], skip_special_tokens=False)
            twice = self.decode([token_id, token_id], skip_special_tokens=False)
            text = twice[len(alone) :] if twice.startswith(alone) else alone
            self._token_texts[token_id] = text
        return text


def shared_room(first: int, second: int, room: int) -> tuple[int, int]:
    """What is left of two texts of so many tokens within `room`: the longer one gives first, then both alike."""
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    longer = room - shorter
    return (longer, shorter) if first > second else (shorter, longer)


def remember(steps: dict[Step, str], step: Step, text: str) -> None:
    """Keep the text that a step adds. At most so many are kept: then all are forgotten."""
    if len(steps) >= MAX_STEPS:
        steps.clear()
    steps[step] = text


def _read_template(value: str) -> str:
    """A chat template given as text (it has Jinja's braces), as a file, or as a JSON string in a file."""
    if "{" in value or "\n" in value:
        return value
    if not os.path.isfile(value):
        raise ConfigError(f"--chat-template: {value!r} is neither a file nor a template")
    with open(value, encoding="utf-8") as file:
        text = file.read()
    if value.endswith(".json"):
        template = json.loads(text)
        if isinstance(template, dict):
            template = template.get("chat_template")
        if not isinstance(template, str):
            raise ConfigError(f"--chat-template: {value!r} holds no chat template")
        return template
    return text
