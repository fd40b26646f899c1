"""Repetition, frequency and presence penalties, from counts kept on the device.

`PenaltyState` belongs to one request and is brought up to date before each of its draws, at the cost of the tokens
that are new; applying it touches only tokens that occurred. Repetition follows HF's rule (prompt and output, divide
positive logits, multiply negative ones); frequency and presence follow OpenAI's (output only).
Called by `engine/sampling/logit_edits.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from multilora.params import SamplingParams
from multilora.transfer import upload


class PenaltyState:
    """The distinct tokens of one request: `ids` int64, `counts` fp32 (in the output), `in_prompt` bool, each [n]."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], device: torch.device):
        self.factors = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        known = sorted(set(prompt_ids)) if params.repetition_penalty != 1.0 else []
        self.ids = upload(known, device)
        self.counts = torch.zeros(len(known), device=device)
        self.in_prompt = torch.ones(len(known), dtype=torch.bool, device=device)
        self._place = {token: i for i, token in enumerate(known)}
        self._counted: list[int] = []

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0

    def update(self, output_ids: Sequence[int]) -> None:
        """Count what is new in `output_ids`; uncount what was rolled back since the last call.

        To be called before every draw, so that a rollback is seen before other tokens take the place of its own.
        """
        counted = self._counted
        undone = []
        while counted and (len(counted) > len(output_ids) or counted[-1] != output_ids[len(counted) - 1]):
            undone.append(counted.pop())
        new = list(output_ids[len(counted) :])
        counted.extend(new)
        self._extend([token for token in dict.fromkeys(new) if token not in self._place])
        self._add(undone, -1.0)
        self._add(new, 1.0)

    def _extend(self, ids: list[int]) -> None:
        """Make room for tokens that never occurred before."""
        if ids:
            self._place.update({token: len(self._place) + i for i, token in enumerate(ids)})
            self.ids = torch.cat([self.ids, upload(ids, self.ids.device)])
            self.counts = torch.cat([self.counts, self.counts.new_zeros(len(ids))])
            self.in_prompt = torch.cat([self.in_prompt, self.in_prompt.new_zeros(len(ids))])

    def _add(self, ids: list[int], amount: float) -> None:
        if ids:
            places = upload([self._place[token] for token in ids], self.ids.device)
            self.counts.index_add_(0, places, self.counts.new_full((len(ids),), amount))


def apply_penalties(logits: Tensor, rows: Sequence[int], states: Sequence[PenaltyState]) -> None:
    """Change rows of logits fp32 [.., vocab] in place; `states[i]` is that of row `rows[i]`."""
    sizes = torch.tensor([len(s.ids) for s in states])
    factors = upload(torch.tensor([s.factors for s in states]).repeat_interleave(sizes, 0), logits.device)
    row = upload(torch.tensor(rows).repeat_interleave(sizes), logits.device)  # [n], n tokens of all states together
    repetition, frequency, presence = factors.unbind(1)  # each [n]
    ids = torch.cat([s.ids for s in states])
    counts = torch.cat([s.counts for s in states])
    in_output = counts > 0
    old = logits[row, ids]
    seen = in_output | torch.cat([s.in_prompt for s in states])
    new = torch.where(seen, torch.where(old < 0, old * repetition, old / repetition), old)
    logits[row, ids] = new - (counts * frequency + in_output * presence)
