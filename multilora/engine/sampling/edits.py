"""What requests do to their logits before anything is chosen: penalties, logit bias, `min_new_tokens`, grammar masks.

`EditTables` owns the device's memory of them: a row of token counts for each request with penalties, a row of
(token, value) pairs for each with `logit_bias` or `min_new_tokens`. Rows are written when a request gets its slot;
the counts grow on the device, by the sampled tokens themselves, so that nothing waits for the host. Repetition
follows HF's rule (prompt and output, divide positive logits, multiply negative ones); frequency and presence follow
OpenAI's (output only). The torch code here serves the CPU and specifies `triton_sampling.py`. Called by `sampler.py`.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multilora.engine.sampling.batch import Column, Numbers
from multilora.engine.sampling.state import SamplingState, needs_counts, needs_prompt
from multilora.errors import BadRequest
from multilora.params import SamplingParams
from multilora.transfer import upload

_MAX_BIAS = 1e30  # anything larger decides alone anyway, and must not overflow fp32
IN_PROMPT, IN_OUTPUT = 1, 2  # a count is IN_OUTPUT · occurrences in the answer, + IN_PROMPT if it is in the prompt


def check_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raise BadRequest for a biased token id outside the vocabulary."""
    for text in params.logit_bias or ():
        if int(text) >= vocab_size:
            raise BadRequest(
                f"logit_bias: token id {int(text)} is outside the vocabulary of {vocab_size}", param="logit_bias"
            )


class RowPool:
    """Numbers of table rows, the lowest free one first. Row 0 belongs to nobody: it stands for "no row"."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self.size = 1

    def take(self) -> int:
        if not self._free:
            self._free = list(range(2 * self.size - 1, self.size - 1, -1))
            self.size *= 2
        return self._free.pop()

    def give_back(self, row: int) -> None:
        self._free.append(row)


class EditTables:
    """Tables on the device, which double when they are full: `counts` int32 [rows, vocab]; `bias_ids` int32 and
    `bias_values` fp32, both [rows, entries]."""

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(1, 0, dtype=torch.int32, device=device)
        self.bias_ids = torch.zeros(1, 0, dtype=torch.int32, device=device)
        self.bias_values = torch.zeros(1, 0, device=device)
        self._count_rows, self._bias_rows = RowPool(), RowPool()
        self._device = device

    def add_counts(self, state: SamplingState) -> int:
        """Returns the request's row of `counts`; 0 if it has no penalties."""
        if not needs_counts(state.params):
            return 0
        row = self._count_rows.take()
        self.counts = _enlarged(self.counts, self._count_rows.size, state.vocab_size)
        self.counts[row].zero_()
        if needs_prompt(state.params):
            known = upload(torch.from_numpy(np.unique(np.array(state.prompt_ids, dtype=np.int64))), self._device)
            self.counts[row].index_fill_(0, known, IN_PROMPT)
        return row

    def add_bias(self, state: SamplingState) -> tuple[int, int, int]:
        """Returns the request's row of the bias tables (0: it has none), how many entries are logit biases, and how
        many behind them forbid the tokens that end the answer."""
        bias = {int(t): max(-_MAX_BIAS, min(_MAX_BIAS, v)) for t, v in (state.params.logit_bias or {}).items()}
        forbids = state.params.min_new_tokens > 0 and state.grammar is None  # the grammar's mask does it otherwise
        ends = sorted({t for t in state.end_ids if t < state.vocab_size}) if forbids else []
        entries = [*bias.items(), *((t, float("-inf")) for t in ends)]
        if not entries:
            return 0, 0, 0
        row = self._bias_rows.take()
        self.bias_ids = _enlarged(self.bias_ids, self._bias_rows.size, len(entries))
        self.bias_values = _enlarged(self.bias_values, self._bias_rows.size, len(entries))
        ids = torch.tensor([t for t, _ in entries], dtype=torch.int32)
        self.bias_ids[row, : len(entries)] = upload(ids, self._device)
        self.bias_values[row, : len(entries)] = upload(torch.tensor([v for _, v in entries]), self._device)
        return row, len(bias), len(ends)

    def free(self, counts_row: int, bias_row: int) -> None:
        if counts_row:
            self._count_rows.give_back(counts_row)
        if bias_row:
            self._bias_rows.give_back(bias_row)


def _enlarged(table: Tensor, rows: int, columns: int) -> Tensor:
    """`table`, or a copy of it with at least so many rows and columns."""
    rows, columns = max(rows, table.shape[0]), max(columns, table.shape[1])
    if table.shape == (rows, columns):
        return table
    larger = table.new_zeros(rows, columns)
    larger[: table.shape[0], : table.shape[1]] = table
    return larger


def edited(logits: Tensor, numbers: Numbers, tables: EditTables, masks: Tensor | None, vocab_size: int) -> Tensor:
    """A copy of logits fp32 [rows, vocab] with every row's edits. masks: int32 [lines, words], see `GrammarCache`;
    of rows that have one, tokens from `vocab_size` on are never allowed."""
    logits = logits.clone()
    penalised = np.flatnonzero(numbers[Column.COUNTS])
    if len(penalised):
        _penalise(logits, penalised, numbers[:, penalised], tables.counts)
    if masks is not None:
        _mask(logits, numbers[Column.MASK], masks, vocab_size)
    for row in np.flatnonzero(numbers[Column.BIASED]):
        table_row, n = int(numbers[Column.BIAS, row]), int(numbers[Column.BIASED, row])
        ids, values = tables.bias_ids[table_row, :n], tables.bias_values[table_row, :n]
        logits[row].index_add_(0, ids, values)
    return logits


def _penalise(logits: Tensor, rows: npt.NDArray[np.intp], numbers: Numbers, counts: Tensor) -> None:
    """In place on `rows` of the logits; `numbers`: those of these rows. Touches only tokens that occurred."""
    counted = counts.numpy()[numbers[Column.COUNTS].astype(np.int64)]
    which, ids = np.divmod(np.flatnonzero(counted != 0), counted.shape[1])  # [n], n tokens of all rows together
    factors = numbers[[Column.REPETITION, Column.FREQUENCY, Column.PRESENCE]][:, which]
    repetition, frequency, presence = torch.from_numpy(factors).float()
    times = torch.from_numpy(counted[which, ids] // IN_OUTPUT)
    index = torch.from_numpy(rows[which]), torch.from_numpy(ids)
    old = logits[index]
    new = torch.where(old < 0, old * repetition, old / repetition)
    logits[index] = new - (times * frequency + (times > 0) * presence)


def _mask(logits: Tensor, lines: npt.NDArray[np.float64], masks: Tensor, vocab_size: int) -> None:
    rows = torch.from_numpy(np.flatnonzero(lines >= 0))
    bits = torch.arange(32, dtype=torch.int32)
    allowed = ((masks[:, :, None] >> bits) & 1).flatten(1).bool()  # [lines, 32 · words]
    within = min(vocab_size, allowed.shape[1])
    logits[rows, :within] = logits[rows, :within].masked_fill_(~allowed[:, :within], float("-inf"))
    logits[rows, within:] = float("-inf")


def count(tokens: Tensor, numbers: Numbers, tables: EditTables) -> None:
    """Count the sampled `tokens`, int64 [rows], for the rows that have penalties."""
    rows = np.flatnonzero(numbers[Column.COUNTS])
    if len(rows):
        counts = tables.counts.numpy()
        counts[numbers[Column.COUNTS, rows].astype(np.int64), tokens.numpy()[rows].clip(max=counts.shape[1] - 1)] += (
            IN_OUTPUT
        )
