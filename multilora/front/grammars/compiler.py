"""From a grammar's source to the text that travels to the engine, and the proof that it can be compiled and met.

What travels is xgrammar's `Grammar`, some hundred bytes per rule. A compiled one would take a hundred times as much:
its JSON repeats the automaton for every rule. So the compiling is done twice, here to see that it ends, and in a
thread of the engine for use. Runs in a process that can be killed (`drivers/grammar_process.py`), or in the caller's
(`drivers/stepping.py`). Imports xgrammar only when the first grammar comes.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from multilora.front.grammars.source import ANY_JSON, unusable
from multilora.front.structural_tag import xgrammar_tag
from multilora.front.tokenizer import Tokenizer

MAX_TEXT = 4 << 20
"""Characters of one grammar as it travels."""
MAX_COMPILED = 64 << 20
"""Bytes of one compiled grammar."""
# what the compiler's own messages begin with
_SOURCE_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: (Check failed: \(std::holds_alternative\S+ is false: )?")
_LAST_CHARACTER = 0x10FFFF


@dataclass(frozen=True, eq=False)
class Setup:
    """What grammars are compiled for. vocab_size: rows of the model's logits; eos_token_ids: what may end a
    constrained answer; none given: the tokenizer's own."""

    tokenizer: Tokenizer
    vocab_size: int
    eos_token_ids: Sequence[int] = ()

    @property
    def stop_token_ids(self) -> list[int] | None:
        """None: to be found by xgrammar."""
        own = self.tokenizer.eos_token_id
        return list(self.eos_token_ids) or (None if own is None else [own])

    def encode(self) -> bytes:
        """For another process. Takes a second for a large vocabulary."""
        backend = self.tokenizer.hf.backend_tokenizer.to_str()
        return msgspec.json.encode([backend, self.vocab_size, self.stop_token_ids])

    @staticmethod
    def decode(data: bytes) -> "GrammarCompiler":
        """The compiler for an encoded setup."""
        from tokenizers import Tokenizer as Backend
        from transformers import PreTrainedTokenizerFast

        backend, vocab_size, stops = msgspec.json.decode(data, type=tuple[str, int, list[int] | None])
        return GrammarCompiler(PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(backend)), vocab_size, stops)


class GrammarCompiler:
    """tokenizer: a fast one of transformers; the other arguments are those of `Setup`."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_token_ids: list[int] | None):
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=stop_token_ids
        )
        self.tokenizer_info: str = info.serialize_json()
        """What grammars are bound to, for the engine: `xgrammar.TokenizerInfo.deserialize_json` takes it."""
        self._info = info

    def compile(self, field: str, source: str) -> str:
        """The grammar as `Submit.grammar` wants it. Raises BadRequest naming `field`, MemoryError."""
        import xgrammar

        try:
            grammar = _build(field, source)
            text: str = grammar.serialize_json()
            self._check_size(field, "its rules are too many", len(text), MAX_TEXT)
            if _is_empty(json.loads(text)):
                raise unusable(field, "no text follows it")
            compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
            compiled = compiler.compile_grammar(grammar)
            self._check_size(field, "it is too large", compiled.memory_size_bytes, MAX_COMPILED)
            mask = xgrammar.allocate_token_bitmask(1, self._info.vocab_size)
            xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(mask)
        except (RuntimeError, ValueError, TypeError) as e:  # RecursionError is a RuntimeError
            if "bad_alloc" in str(e):
                raise MemoryError from e
            raise unusable(field, _SOURCE_PLACE.sub("", str(e)).strip()) from e
        if not mask.any():
            raise unusable(field, "no token of the model's can begin it")
        return text

    @staticmethod
    def _check_size(field: str, reason: str, size: int, limit: int) -> None:
        if size > limit:
            raise unusable(field, f"{reason}: {size} bytes, at most {limit} are served")


def _build(field: str, source: str) -> Any:
    """xgrammar's Grammar. Raises RuntimeError and ValueError."""
    from xgrammar import Grammar

    if field == "json_schema" and source == ANY_JSON:
        return Grammar.builtin_json_grammar()
    builders = {
        "json_schema": Grammar.from_json_schema,
        "regex": Grammar.from_regex,
        "ebnf": Grammar.from_ebnf,
        "structural_tag": lambda tag: Grammar.from_structural_tag(xgrammar_tag(tag)),
    }
    return builders[field](source)


def _is_empty(grammar: dict[str, Any]) -> bool:
    """Whether no finite text follows a grammar (xgrammar's JSON): its root has no way to an end."""
    data, starts, rules = grammar["grammar_expr_data"], grammar["grammar_expr_indptr"], grammar["rules"]
    ending: set[int] = set()  # rules that have one

    def ends(expression: int) -> bool:
        at = starts[expression]
        kind, items = data[at], data[at + 2 : at + 2 + data[at + 1]]
        match kind:
            case 1:  # a character class
                return not (items[0] and _is_everything(items[1:]))
            case 4:  # a rule
                return items[0] in ending
            case 5:  # a sequence
                return all(map(ends, items))
            case 6:  # choices
                return any(map(ends, items))
            case 8:  # a repeated rule
                return items[1] == 0 or items[0] in ending
            case _:
                return True

    while True:
        new = {i for i, rule in enumerate(rules) if i not in ending and ends(rule[1])}
        if not new:
            return grammar["root_rule_id"] not in ending
        ending |= new


def _is_everything(bounds: Sequence[int]) -> bool:
    """Whether ranges, first and last characters in turn, leave nothing out."""
    covered = -1
    for first, last in sorted(zip(bounds[::2], bounds[1::2], strict=True)):
        if first > covered + 1:
            return False
        covered = max(covered, last)
    return covered >= _LAST_CHARACTER
