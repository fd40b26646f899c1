"""Logits in, one token per row out: edits, grammar masks, then argmax or a random draw, and logprobs.

Owns what sampling keeps of each request, by slot: numbers on the host, counts and biases on the device, the state of
its grammar. A step uploads two tensors at most: the numbers of its rows, and grammar masks. Knows nothing of text,
stopping or scheduling. A row's token depends on that row alone, never on its neighbours; stages that no row needs are
skipped; nothing waits for the device before `read`. Called by `engine/execution/runner.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multilora.engine.faults import NONE_ALLOWED, NOT_FINITE
from multilora.engine.messages import Logprobs
from multilora.engine.sampling import triton_argmax, triton_sampling
from multilora.engine.sampling.batch import Column, SamplingBatch, SlotTable
from multilora.engine.sampling.draw import argmax, draw, processed
from multilora.engine.sampling.edits import EditTables, check_bias, count, edited
from multilora.engine.sampling.grammar import GrammarCache, GrammarState
from multilora.engine.sampling.logprobs import TokenLogprobs, token_logprobs
from multilora.engine.sampling.state import SamplingState
from multilora.errors import BadRequest
from multilora.params import SamplingParams
from multilora.transfer import download, upload

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Sampled:
    """On the host, one entry per row. A row with an error has a meaningless token."""

    token_ids: list[int]
    logprobs: list[Logprobs | None]  # None where not asked for
    errors: list[str | None]


@dataclass(frozen=True, slots=True)
class DeviceSampled:
    """On the device, possibly still being computed. `token_ids` can feed the next forward pass as they are."""

    token_ids: Tensor  # int64 [rows]
    finite: Tensor  # bool [rows], the row's logits were
    allowed: Tensor | None  # bool [rows], some token was; None: nothing was forbidden in any row
    logprobs: TokenLogprobs | None  # of the rows `asked`
    asked: npt.NDArray[np.intp]
    top_logprobs: npt.NDArray[np.int64]  # [rows], as in SamplingState
    grammars: tuple[tuple[int, int, GrammarState], ...]  # (row, slot, state) of the rows under a grammar

    def to_cpu(self) -> "DeviceSampled":
        """Start to copy to the host: what comes back is complete once a `Fence` made afterwards has passed."""
        return DeviceSampled(
            download(self.token_ids),
            download(self.finite),
            None if self.allowed is None else download(self.allowed),
            None if self.logprobs is None else self.logprobs.to_cpu(),
            self.asked,
            self.top_logprobs,
            self.grammars,
        )


@dataclass(frozen=True, slots=True)
class _SlotState:
    """What a slot holds beside its numbers."""

    counts_row: int
    bias_row: int
    grammar: GrammarState | None


@dataclass(frozen=True, slots=True)
class _Greatest:
    """What is the greatest in each row of logits."""

    values: Tensor  # fp32 [rows], NaN if any of the row is
    finite: Tensor  # bool [rows]
    tokens: Tensor | None  # int64 [rows]; None: on CPU, where `argmax` finds them if they are asked for


class Sampler:
    """Chooses tokens: one per engine and rank, on the device of the logits.

    vocab_size: the base model's; rows of logits are longer in a step that has an adapter with more tokens.
    eos_token_ids: what ends an answer under a grammar.
    """

    def __init__(self, vocab_size: int, device: torch.device, eos_token_ids: Sequence[int] = ()):
        self.vocab_size = vocab_size
        self.device = device
        self._eos_token_ids = tuple(eos_token_ids)
        self._table = SlotTable()
        self._edits = EditTables(device)
        self._slots: dict[int, _SlotState] = {}
        self._grammars: GrammarCache | None = None

    # ------------------------------------------------------------------ requests

    def use_tokenizer(self, info: str) -> None:
        """xgrammar's serialized TokenizerInfo, which later grammars are bound to."""
        self._grammars = GrammarCache(info, self.vocab_size)

    def grammar_ready(self, grammar: str) -> bool:
        """Whether `check` and `install` need not wait for the grammar to be compiled; if not, that begins now."""
        return self._grammars is None or self._grammars.ready(grammar)

    def check(self, params: SamplingParams, vocab_size: int, grammar: str | None) -> None:
        """Raise BadRequest for what only the sampler can tell: a grammar that cannot be used, a biased token outside
        the vocabulary of `vocab_size` tokens."""
        check_bias(params, vocab_size)
        if grammar is not None:
            self._cache().read(grammar)

    @torch.inference_mode()
    def install(self, state: SamplingState) -> None:
        """Give a request the slot `state.slot`, with nothing left there of an earlier one. Raises BadRequest as
        `check` does."""
        self.check(state.params, state.vocab_size, state.grammar)
        self.free(state.slot)
        grammar = None
        if state.grammar is not None:
            compiled = self._cache().read(state.grammar)
            grammar = GrammarState(compiled, self._eos_token_ids, state.end_ids, state.params.min_new_tokens)
        counts_row = self._edits.add_counts(state)
        bias_row, biased, ends = self._edits.add_bias(state)
        self._table.set(state, counts_row, bias_row, (biased, ends))
        self._slots[state.slot] = _SlotState(counts_row, bias_row, grammar)

    def free(self, slot: int) -> None:
        """The slot's request has ended. Rows of steps in flight for it touch nothing of a later one: the device works
        through counts and installs in the order in which the host queued them."""
        held = self._slots.pop(slot, None)
        if held is not None:
            self._table.clear(slot)
            self._edits.free(held.counts_row, held.bias_row)

    def needs_tokens(self, slots: Sequence[int]) -> bool:
        """Whether masks of these rows depend on tokens that the host may not have read yet: `read` the step before
        first."""
        return any(slot in self._slots and self._slots[slot].grammar is not None for slot in slots)

    def _cache(self) -> GrammarCache:
        if self._grammars is None:
            raise BadRequest("grammars need a tokenizer; this server runs without one", param="json_schema")
        return self._grammars

    # ------------------------------------------------------------------ one step

    @torch.inference_mode()
    def sample(self, logits: Tensor, slots: Sequence[int] | Ints, positions: Sequence[int] | Ints) -> DeviceSampled:
        """One token for each row of `logits`, fp32 [rows, vocab], which is left as it is.

        slots: of each row, no slot twice. positions: index of the new token within the answer.
        """
        slots, positions = np.asarray(slots, dtype=np.int32), np.asarray(positions, dtype=np.int32)
        assert len(logits) == len(slots) == len(positions), (logits.shape, len(slots), len(positions))
        assert logits.dtype == torch.float32 and logits.shape[1] >= self.vocab_size, (logits.dtype, logits.shape)
        batch = self._table.batch(slots, positions)
        found = chosen = self._greatest(logits)
        partly_asked = 0 < len(batch.asked) < len(logits)
        on_device = logits.new_empty(0)
        if batch.edits or not batch.all_greedy or partly_asked or batch.processes:
            on_device = upload(torch.from_numpy(batch.numbers), self.device)
        masks, grammars = self._masks(batch, slots, positions)
        chosen_from = logits
        if batch.edits:
            chosen_from = self._edit(logits, batch, on_device, masks)
            chosen = self._greatest(chosen_from)
        tokens, judged = self._choose(logits, chosen_from, chosen, batch, on_device)
        return DeviceSampled(
            token_ids=tokens,
            finite=found.finite,
            allowed=chosen.finite if batch.edits else None,
            logprobs=_logprobs(judged, tokens, batch, on_device),
            asked=batch.asked,
            top_logprobs=batch.top_logprobs,
            grammars=grammars,
        )

    def read(self, sampled: DeviceSampled) -> Sampled:
        """Fetch a step to the host (after its `Fence`) and advance the grammars of its rows, but not by a token that
        ends the answer, nor for a slot that was freed meanwhile."""
        tokens, finite = sampled.token_ids.tolist(), sampled.finite.tolist()
        allowed = [True] * len(finite) if sampled.allowed is None else sampled.allowed.tolist()
        errors = [
            None if f and a else NONE_ALLOWED if f else NOT_FINITE for f, a in zip(finite, allowed, strict=True)
        ]
        for row, slot, grammar in sampled.grammars:
            grammar.in_flight -= 1
            held = self._slots.get(slot)
            alive = held is not None and held.grammar is grammar
            if alive and errors[row] is None and tokens[row] not in grammar.ends and not grammar.accept(tokens[row]):
                errors[row] = f"token {tokens[row]} left the grammar"
        logprobs: list[Logprobs | None] = [None] * len(tokens)
        if sampled.logprobs is not None:
            for row, value in zip(sampled.asked.tolist(), sampled.logprobs.to_host(), strict=True):
                logprobs[row] = Logprobs(value.logprob, value.top[: sampled.top_logprobs[row]], value.rank)
        return Sampled(tokens, logprobs, errors)

    def _masks(
        self, batch: SamplingBatch, slots: Ints, positions: Ints
    ) -> tuple[Tensor | None, tuple[tuple[int, int, GrammarState], ...]]:
        """The grammar masks on the device, one line per row under a grammar, and those rows' states."""
        if not batch.masks:
            return None, ()
        found: list[tuple[int, int, GrammarState]] = []
        for row in np.flatnonzero(batch.numbers[Column.MASK] >= 0).tolist():
            grammar = self._slots[int(slots[row])].grammar
            assert grammar is not None and grammar.in_flight == 0, "the step before was not read"
            grammar.in_flight += 1
            found.append((row, int(slots[row]), grammar))
        states, places = [state for _, _, state in found], [int(positions[row]) for row, _, _ in found]
        masks = self._cache().masks(states, places, pinned=self.device.type == "cuda")
        return upload(masks, self.device), tuple(found)

    def _edit(self, logits: Tensor, batch: SamplingBatch, on_device: Tensor, masks: Tensor | None) -> Tensor:
        if self.device.type == "cpu":
            return edited(logits, batch.numbers, self._edits, masks, self.vocab_size)
        return triton_sampling.edited(logits, on_device, self._edits, masks, self.vocab_size, biases=batch.biases)

    def _greatest(self, logits: Tensor) -> _Greatest:
        if self.device.type == "cpu":
            best = logits.amax(-1)
            return _Greatest(best, best.isfinite(), None)
        return _Greatest(*triton_argmax.argmax(logits))

    def _choose(
        self, raw: Tensor, logits: Tensor, greatest: _Greatest, batch: SamplingBatch, on_device: Tensor
    ) -> tuple[Tensor, Tensor]:
        """From the edited `logits`: the tokens, int64 [rows], counted where there are penalties, and the logits that
        their logprobs are taken from: `raw` ones in most steps. greatest: of the edited ones."""
        if self.device.type == "cpu":
            tokens = argmax(logits) if batch.all_greedy else draw(logits, batch.numbers)
            count(tokens, batch.numbers, self._edits)
            return tokens, processed(raw, logits, batch.numbers) if batch.processes else raw
        if batch.all_greedy and not batch.penalises and not batch.processes:
            assert greatest.tokens is not None
            return greatest.tokens, raw
        best = greatest.values
        kept = triton_sampling.keep(logits, best, on_device, truncates=batch.truncates)
        tokens = triton_sampling.draw(logits, best, on_device, self._edits.counts, kept)
        if not batch.processes:
            return tokens, raw
        return tokens, triton_sampling.processed(raw, logits, best, on_device, kept)


def _logprobs(logits: Tensor, tokens: Tensor, batch: SamplingBatch, on_device: Tensor) -> TokenLogprobs | None:
    n = len(batch.asked)
    if n == 0:
        return None
    if n < len(logits):
        rows = on_device[Column.ASKED, :n].long()
        logits, tokens = logits[rows], tokens[rows]
    return token_logprobs(logits, tokens, int(batch.top_logprobs.max()), ranks=batch.ranks)
