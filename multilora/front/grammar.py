"""Grammars for constrained decoding, compiled at the door so that a bad one is the client's error.

Owns the compiler and a cache of its results, as the JSON that travels to the engine. Methods run in a worker thread:
a large schema over a large vocabulary takes seconds, and so does the first import of xgrammar.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from multilora.errors import BadRequest
from multilora.front.structural_tag import xgrammar_tag
from multilora.front.tokenizer import Tokenizer
from multilora.params import SamplingParams

ANY_JSON = "$$ANY$$"  # as json_schema: any JSON value
_CACHE_ENTRIES = 64
# what the compiler's own messages begin with
_SOURCE_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: (Check failed: \(std::holds_alternative\S+ is false: )?")


class GrammarCompiler:
    """tokenizer: the base model's; None: nothing may be compiled. vocab_size: rows of the model's logits.

    eos_token_ids: ids that may end a constrained answer; none given: the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._cache: OrderedDict[tuple[str, str], str] = OrderedDict()  # (field, source) → compiled, oldest first
        self._lock = threading.Lock()

    @cached_property
    def _info(self) -> Any:
        """xgrammar's TokenizerInfo."""
        import xgrammar  # heavy, and most servers never need it

        assert self._tokenizer is not None
        own = self._tokenizer.eos_token_id
        ends = self._eos_token_ids or ([] if own is None else [own])
        return xgrammar.TokenizerInfo.from_huggingface(
            self._tokenizer.hf, vocab_size=self._vocab_size, stop_token_ids=ends or None
        )

    @cached_property
    def _compiler(self) -> Any:
        import xgrammar

        return xgrammar.GrammarCompiler(self._info, max_threads=2, cache_enabled=False)

    def tokenizer_info_json(self) -> str:
        """What `xgrammar.TokenizerInfo.deserialize_json` takes, for the engine."""
        text: str = self._info.serialize_json()
        return text

    def compile(self, params: SamplingParams) -> str | None:
        """The request's grammar as `Submit.grammar` wants it; None if it has none. Raises BadRequest."""
        field = params.grammar_field
        return None if field is None else self._cached(field, getattr(params, field))

    def _cached(self, field: str, source: str) -> str:
        key = (field, source)
        with self._lock:
            compiled = self._cache.get(key)
            if compiled is not None:
                self._cache.move_to_end(key)
                return compiled
        compiled = self._compile(field, source)
        with self._lock:
            self._cache[key] = compiled
            if len(self._cache) > _CACHE_ENTRIES:
                self._cache.popitem(last=False)
        return compiled

    def _compile(self, field: str, source: str) -> str:
        try:
            if field == "regex":
                grammar = self._compiler.compile_regex(source)
            elif field == "ebnf":
                grammar = self._compiler.compile_grammar(source)
            elif field == "structural_tag":
                grammar = self._compiler.compile_structural_tag(xgrammar_tag(source))
            elif source == ANY_JSON:
                grammar = self._compiler.compile_builtin_json_grammar()
            else:
                json.loads(source)  # its errors say where
                grammar = self._compiler.compile_json_schema(source)
        except (RuntimeError, ValueError, TypeError) as e:  # RecursionError is a RuntimeError
            reason = _SOURCE_PLACE.sub("", str(e)).strip()
            raise BadRequest(f"sampling_params.{field} is not a usable grammar: {reason}", param=field) from e
        text: str = grammar.serialize_json()
        return text
