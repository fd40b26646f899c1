"""Grammar-constrained output: which tokens may come next, as bit masks from xgrammar.

The front compiles grammars and sends them serialized; `GrammarCache` reads them once, `GrammarState` follows one
request. Masks are made on the host and applied on the device. Called by `engine/engine.py` (start, accept, rollback)
and `engine/sampling/sampler.py` (masks).
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence

import torch
import xgrammar
from torch import Tensor

from multilora.errors import BadRequest
from multilora.transfer import upload

logger = logging.getLogger(__name__)


class GrammarState:
    """Where one request stands in its grammar. Ends by accepting a stop token; then only stop tokens may follow."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, stop_token_ids: Sequence[int]):
        self._matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=list(stop_token_ids) or None)
        self._stop_token_ids = tuple(self._matcher.stop_token_ids)
        self._words = (compiled.tokenizer_info.vocab_size + 31) // 32
        self._after_end = 0  # stop tokens accepted after the first one

    @property
    def is_terminated(self) -> bool:
        return self._matcher.is_terminated()

    def accept(self, token: int) -> bool:
        """Advance by one token. False, with the state unchanged, if the grammar does not allow it here."""
        if not self.is_terminated:
            return self._matcher.accept_token(token)
        if token not in self._stop_token_ids:
            return False
        self._after_end += 1
        return True

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens."""
        after_end = min(count, self._after_end)
        self._after_end -= after_end
        if count > after_end:
            self._matcher.rollback(count - after_end)

    def fill_mask(self, mask: Tensor, forbidden: Sequence[int] = ()) -> None:
        """Set bit t of `mask`, int32 [words] on the host, for each token t that may come next.

        `forbidden` tokens are taken out unless nothing else would be left: a finished grammar must be able to end.
        """
        mask.zero_()
        if self.is_terminated:
            _set_bits(mask, self._stop_token_ids)
            return
        self._matcher.fill_next_token_bitmask(mask[None, : self._words])
        if forbidden:
            bits = torch.zeros_like(mask)
            _set_bits(bits, forbidden)
            without = mask & ~bits
            if without.any():
                mask.copy_(without)


class GrammarCache:
    """Compiled grammars by digest of their serialized form, the least recently used dropped first.

    `tokenizer_info` is the front's `TokenizerInfo.serialize_json()`: grammars are bound to it.
    """

    def __init__(self, tokenizer_info: str, vocab_size: int, capacity: int = 64):
        self._tokenizer_info = xgrammar.TokenizerInfo.deserialize_json(tokenizer_info)
        if self._tokenizer_info.vocab_size > vocab_size:
            raise ValueError(f"grammar vocabulary {self._tokenizer_info.vocab_size} > the model's {vocab_size}")
        self._capacity = capacity
        self._compiled: OrderedDict[bytes, xgrammar.CompiledGrammar] = OrderedDict()

    def __len__(self) -> int:
        return len(self._compiled)

    def start(self, grammar: str, stop_token_ids: Sequence[int]) -> GrammarState:
        """A request's state at the beginning of `grammar` (`CompiledGrammar.serialize_json()`).

        Raises BadRequest when it cannot be read or was compiled for another tokenizer.
        """
        key = hashlib.blake2b(grammar.encode(), digest_size=16).digest()
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = self._read(grammar)
            logger.debug("grammar %s read, %d bytes", key.hex(), compiled.memory_size_bytes)
            if len(self._compiled) > self._capacity:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return GrammarState(compiled, stop_token_ids)

    def _read(self, grammar: str) -> xgrammar.CompiledGrammar:
        try:
            return xgrammar.CompiledGrammar.deserialize_json(grammar, self._tokenizer_info)
        except (RuntimeError, ValueError) as e:  # xgrammar's own errors derive from these
            raise BadRequest(f"the grammar cannot be used: {e}", param="grammar") from None


def apply_masks(logits: Tensor, rows: Sequence[int], masks: Tensor, vocab_size: int | None = None) -> None:
    """−inf in place where a bit is not set: logits [.., vocab], masks int32 [len(rows), words] on the host.

    vocab_size: tokens from this one on, which grammars do not know, are never allowed.
    """
    masks = upload(masks, logits.device)
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((masks[:, :, None] >> bits) & 1).flatten(1)[:, : logits.shape[1]].bool()  # [r, vocab]
    allowed[:, logits.shape[1] if vocab_size is None else vocab_size :] = False
    index = upload(rows, logits.device)
    logits[index] = logits[index].masked_fill_(~allowed, float("-inf"))


def _set_bits(mask: Tensor, tokens: Sequence[int]) -> None:
    view = mask.numpy().view("uint32")
    for token in tokens:
        view[token >> 5] |= 1 << (token & 31)
