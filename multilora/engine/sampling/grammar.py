"""Grammar-constrained output: which tokens may come next, as bit masks from xgrammar.

The front checks grammars and sends them as text; `GrammarCache` compiles each once, `GrammarState` follows one
request. The masks of a step are made on the host in one call, on several threads. Called by
`engine/sampling/sampler.py`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch
import xgrammar
from torch import Tensor

from multilora.engine.sampling.background import Background
from multilora.errors import BadRequest

CACHE_BYTES = 256 << 20
COMPILE_THREADS = 2


class GrammarState:
    """Where one request stands in its grammar. Ends by accepting a stop token; then only stop tokens may follow.

    forbidden: tokens that end the answer, for `min_new_tokens`: while the position is below it they are taken out of
    the mask, unless nothing else would be left, as a finished grammar must be able to end.
    """

    def __init__(
        self,
        compiled: xgrammar.CompiledGrammar,
        stop_token_ids: Sequence[int],
        forbidden: Sequence[int] = (),
        min_new_tokens: int = 0,
    ):
        self.matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=list(stop_token_ids) or None)
        self.stop_token_ids = tuple(self.matcher.stop_token_ids)
        self.ends = frozenset(forbidden)
        self.in_flight = 0  # tokens that were sampled under its masks and not yet accepted
        self._min_new_tokens = min_new_tokens

    @property
    def is_terminated(self) -> bool:
        terminated: bool = self.matcher.is_terminated()
        return terminated

    def must_go_on(self, position: int) -> bool:
        """Whether the token at `position` of the answer may not be one of `ends`."""
        return position < self._min_new_tokens and bool(self.ends)

    def accept(self, token: int) -> bool:
        """Advance by one token. False, with the state unchanged, if the grammar does not allow it here."""
        if self.is_terminated:
            return token in self.stop_token_ids
        accepted: bool = self.matcher.accept_token(token)
        return accepted


class GrammarCache:
    """Compiled grammars by their text, as many as fit `capacity` bytes; the least recently used is dropped
    first.

    `tokenizer_info` is the front's `TokenizerInfo.serialize_json()`: grammars are compiled for it. A text is that of
    `Grammar.serialize_json()`; the front has tried what it costs to compile, which is done on threads of its own.
    """

    def __init__(self, tokenizer_info: str, vocab_size: int, capacity: int = CACHE_BYTES):
        self._tokenizer_info = xgrammar.TokenizerInfo.deserialize_json(tokenizer_info)
        if self._tokenizer_info.vocab_size > vocab_size:
            raise ValueError(f"grammar vocabulary {self._tokenizer_info.vocab_size} > the model's {vocab_size}")
        self._capacity = capacity
        self._compiler = xgrammar.GrammarCompiler(self._tokenizer_info, max_threads=1, cache_enabled=False)
        self._compiled: OrderedDict[str, xgrammar.CompiledGrammar] = OrderedDict()
        self._compiling: dict[str, Future[xgrammar.CompiledGrammar]] = {}
        self._background = Background(COMPILE_THREADS, "grammar")
        self._bytes = 0
        self._filler = xgrammar.BatchGrammarMatcher()

    def __len__(self) -> int:
        return len(self._compiled)

    def ready(self, grammar: str) -> bool:
        """Whether `read` will return, or raise, at once; if not, the grammar is being compiled from now on."""
        if grammar in self._compiled:
            return True
        if grammar not in self._compiling:
            self._compiling[grammar] = self._background.submit(partial(self._compile, grammar))
        return self._compiling[grammar].done()

    def read(self, grammar: str) -> xgrammar.CompiledGrammar:
        """The compiled form of `grammar`. Compiles it now where `ready` has not been asked, or too long ago.

        Raises BadRequest when it cannot be read or compiled.
        """
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiling = self._compiling.pop(grammar, None)
            compiled = self._compile(grammar) if compiling is None else compiling.result()
            self._keep(grammar, compiled)
        self._compiled.move_to_end(grammar)
        return compiled

    def _keep(self, grammar: str, compiled: xgrammar.CompiledGrammar) -> None:
        self._compiled[grammar] = compiled
        self._bytes += _size(grammar, compiled)
        while self._bytes > self._capacity and len(self._compiled) > 1:
            self._bytes -= _size(*self._compiled.popitem(last=False))

    def _compile(self, grammar: str) -> xgrammar.CompiledGrammar:
        try:
            return self._compiler.compile_grammar(xgrammar.Grammar.deserialize_json(grammar))
        except (RuntimeError, ValueError) as e:  # xgrammar's own errors derive from these
            raise BadRequest(f"the grammar cannot be used: {e}", param="grammar") from None

    def masks(self, states: Sequence[GrammarState], positions: Sequence[int], *, pinned: bool) -> Tensor:
        """int32 [len(states), words] on the host: bit t of a line is set if token t may come next.

        Tokens beyond the grammars' vocabulary have no bit. positions: of the new tokens within their answers.
        """
        words = (self._tokenizer_info.vocab_size + 31) // 32
        masks = torch.zeros(len(states), words, dtype=torch.int32, pin_memory=pinned)
        bits = masks.numpy().view(np.uint32)
        matching = [(line, s) for line, s in enumerate(states) if not s.is_terminated]
        if matching:
            lines = [line for line, _ in matching]
            self._filler.batch_fill_next_token_bitmask([s.matcher for _, s in matching], masks, lines)
        for line, (state, position) in enumerate(zip(states, positions, strict=True)):
            if state.is_terminated:
                bits[line] |= _bits(state.stop_token_ids, words)
            elif state.must_go_on(position):
                without = bits[line] & ~_bits(state.ends, words)
                if without.any():
                    bits[line] = without
        return masks


def _size(grammar: str, compiled: xgrammar.CompiledGrammar) -> int:
    return len(grammar) + int(compiled.memory_size_bytes)


def _bits(tokens: Sequence[int] | frozenset[int], words: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    line = np.zeros(words, dtype=np.uint32)
    for token in tokens:
        if token < 32 * words:
            line[token >> 5] |= np.uint32(1 << (token & 31))
    return line
