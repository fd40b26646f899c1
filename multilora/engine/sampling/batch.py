"""The numbers of one sampling step: gathered from a table on the host, sent to the device in one copy.

`SlotTable` holds a column of numbers per sampling slot, written once when a request gets the slot; a step gathers the
columns of its rows and adds what depends on the position. Knows no tensors of logits. Called by `sampler.py`.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from multilora.engine.sampling.state import SamplingState
from multilora.engine.sampling.uniform import mixed_seed, uniforms

MIN_TEMPERATURE = 1e-20  # below, fp32 division would give 0 / 0; the distribution is the argmax long before
NO_LIMIT = 2.0**31  # the top_k of a request without one

Numbers = npt.NDArray[np.float64]


class Column(IntEnum):
    """The lines of `SamplingBatch.numbers`, float64 [len(Column), rows]; integers in it are exact."""

    KIND = 0  # a Kind
    TEMPERATURE = 1
    TOP_P = 2
    TOP_K = 3
    MIN_P = 4
    UNIFORM = 5  # the random number of (seed, position)
    REPETITION = 6
    FREQUENCY = 7
    PRESENCE = 8
    COUNTS = 9  # row of the count table; 0: no penalties
    BIAS = 10  # row of the bias table
    BIASED = 11  # how many of that row's entries act in this step
    MASK = 12  # row of the step's grammar masks; -1: no grammar
    ASKED = 13  # not of this row: the numbers of the rows that want logprobs, one after the other
    SOURCE = 14  # a Source


class Kind(IntEnum):
    """How a row's token is found."""

    PLAIN = 0  # drawn from all tokens, or those that min-p leaves
    GREEDY = 1
    TRUNCATED = 2  # drawn after top-k or top-p


class Source(IntEnum):
    """What a row's logprobs are the log-softmax of."""

    RAW = 0  # the model's logits
    EDITED = 1  # of a greedy row: after all edits; it has no temperature
    TEMPERED = 2  # the distribution that the token is drawn from


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """One step's rows, on the host, and which stages any of them needs."""

    numbers: Numbers
    top_logprobs: npt.NDArray[np.int64]  # [rows], as in `SamplingState`
    asked: npt.NDArray[np.intp]  # the rows that want logprobs
    all_greedy: bool
    truncates: bool
    penalises: bool
    biases: bool
    masks: bool
    ranks: bool  # wanted with the logprobs of some row
    processes: bool  # some row's logprobs are not of the raw logits

    @property
    def edits(self) -> bool:
        return self.penalises or self.biases or self.masks


class SlotTable:
    """What steps need of each slot. Grows with the highest slot number; a free slot samples greedily, unedited."""

    def __init__(self) -> None:
        self._numbers = np.zeros((len(Column), 0))
        self._streams = np.zeros(0, dtype=np.uint64)
        # bias entries, end entries, min_new_tokens, top_logprobs, ranks
        self._ints = np.zeros((5, 0), dtype=np.int64)

    def set(self, state: SamplingState, counts_row: int, bias_row: int, entries: tuple[int, int]) -> None:
        """Write a slot's column. entries: how many the row of the bias table has of `logit_bias`, and behind them of
        tokens that `min_new_tokens` forbids."""
        self._grow(state.slot + 1)
        params, column = state.params, np.zeros(len(Column))
        truncated = params.top_k > 0 or params.top_p < 1.0
        column[Column.KIND] = Kind.GREEDY if params.greedy else Kind.TRUNCATED if truncated else Kind.PLAIN
        column[Column.TEMPERATURE] = max(params.temperature, MIN_TEMPERATURE)
        column[Column.TOP_P] = params.top_p
        column[Column.TOP_K] = params.top_k if params.top_k > 0 else NO_LIMIT
        column[Column.MIN_P] = params.min_p
        column[Column.REPETITION] = params.repetition_penalty
        column[Column.FREQUENCY] = params.frequency_penalty
        column[Column.PRESENCE] = params.presence_penalty
        column[Column.COUNTS] = counts_row
        column[Column.BIAS] = bias_row
        column[Column.MASK] = -1 if state.grammar is None else 0
        if state.processed and state.top_logprobs >= 0:
            column[Column.SOURCE] = Source.EDITED if params.temperature == 0 else Source.TEMPERED
        self._numbers[:, state.slot] = column
        self._streams[state.slot] = mixed_seed(state.seed)
        self._ints[:, state.slot] = (*entries, params.min_new_tokens, state.top_logprobs, state.ranks)

    def clear(self, slot: int) -> None:
        """What rows still in flight for a freed slot do touches nothing that another request may own."""
        column = np.zeros(len(Column))
        column[[Column.KIND, Column.TEMPERATURE, Column.TOP_P, Column.TOP_K]] = Kind.GREEDY, 1.0, 1.0, NO_LIMIT
        column[[Column.REPETITION, Column.MASK]] = 1.0, -1
        self._numbers[:, slot] = column
        self._ints[:, slot] = 0, 0, 0, -1, 0

    def batch(self, slots: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]) -> SamplingBatch:
        """The rows of one step: `positions` are those of the new tokens within their answers."""
        numbers = self._numbers.take(slots, axis=1)  # contiguous, unlike [:, slots]
        biased, ends, minimum, top_logprobs, ranks = self._ints[:, slots]
        numbers[Column.BIASED] = biased + ends * (positions < minimum)
        asked = np.flatnonzero(top_logprobs >= 0)
        numbers[Column.ASKED, : len(asked)] = asked
        masked = numbers[Column.MASK] >= 0
        numbers[Column.MASK] = np.where(masked, masked.cumsum() - 1, -1)
        kinds = numbers[Column.KIND]
        all_greedy = bool((kinds == Kind.GREEDY).all())
        if not all_greedy:
            numbers[Column.UNIFORM] = uniforms(self._streams[slots], positions)
        return SamplingBatch(
            numbers=numbers,
            top_logprobs=top_logprobs,
            asked=asked,
            all_greedy=all_greedy,
            truncates=bool((kinds == Kind.TRUNCATED).any()),
            penalises=bool(numbers[Column.COUNTS].any()),
            biases=bool(numbers[Column.BIASED].any()),
            masks=bool(masked.any()),
            ranks=len(asked) > 0 and bool(ranks.any()),
            processes=len(asked) > 0 and bool(numbers[Column.SOURCE].any()),
        )

    def _grow(self, size: int) -> None:
        old = self._numbers.shape[1]
        if size > old:
            more = max(size, 2 * old) - old
            self._numbers = np.pad(self._numbers, ((0, 0), (0, more)))
            self._streams = np.pad(self._streams, (0, more))
            self._ints = np.pad(self._ints, ((0, 0), (0, more)))
            for slot in range(old, old + more):
                self.clear(slot)
