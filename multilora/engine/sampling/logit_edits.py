"""What one request does to its logits before anything is chosen: penalties, logit bias, `min_new_tokens`.

`LogitEdits` is made once per request, at admission (which is where a token id outside the vocabulary is refused), and
keeps its tensors on the device, so that a step uploads nothing but row numbers. Grammar masks come after these edits
and are not known here. Called by `engine/sampling/sampler.py`.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from multilora.engine.sampling.penalties import PenaltyState, apply_penalties
from multilora.errors import BadRequest
from multilora.params import SamplingParams
from multilora.transfer import upload

_MAX_BIAS = 1e30  # anything larger decides alone anyway, and must not overflow fp32


class LogitEdits:
    """The edits of one request; lives as long as the request does, preempted or not."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ):
        self.penalties = PenaltyState(params, prompt_ids, device) if PenaltyState.needed(params) else None
        bias = _bias(params, vocab_size)
        self.bias_ids = upload(list(bias), device)
        self.bias_values = upload(torch.tensor(list(bias.values()), dtype=torch.float32), device)
        self._min_new_tokens = params.min_new_tokens
        ends = [*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_token_ids)]
        self.end_ids = sorted({t for t in ends if t < vocab_size}) if params.min_new_tokens else []
        self.end_index = upload(self.end_ids, device)

    @classmethod
    def make(
        cls,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> Self | None:
        """None when the request edits nothing. Raises BadRequest for a biased token id outside the vocabulary."""
        if not (PenaltyState.needed(params) or params.logit_bias or params.min_new_tokens):
            return None
        return cls(params, prompt_ids, eos_token_ids, vocab_size, device)

    def must_go_on(self, position: int) -> bool:
        """Whether the token at `position` may not be one of `end_ids`."""
        return position < self._min_new_tokens and bool(self.end_ids)


def _bias(params: SamplingParams, vocab_size: int) -> dict[int, float]:
    bias: dict[int, float] = {}
    for text, value in (params.logit_bias or {}).items():
        token = int(text)
        if token >= vocab_size:
            raise BadRequest(
                f"logit_bias: token id {token} is outside the vocabulary of {vocab_size}", param="logit_bias"
            )
        bias[token] = max(-_MAX_BIAS, min(_MAX_BIAS, value))
    return bias


def apply_penalties_and_bias(logits: Tensor, edits: Sequence[tuple[int, LogitEdits, Sequence[int]]]) -> None:
    """In place on fp32 [rows, vocab]; `edits`: (row, its edits, its output tokens so far)."""
    penalised = [(row, edit.penalties) for row, edit, _ in edits if edit.penalties is not None]
    for _, edit, output_ids in edits:
        if edit.penalties is not None:
            edit.penalties.update(output_ids)
    if penalised:
        apply_penalties(logits, [row for row, _ in penalised], [state for _, state in penalised])
    biased = [(row, edit) for row, edit, _ in edits if len(edit.bias_ids)]
    if biased:
        rows = _repeat([(row, len(edit.bias_ids)) for row, edit in biased], logits.device)
        ids = torch.cat([edit.bias_ids for _, edit in biased])
        logits[rows, ids] += torch.cat([edit.bias_values for _, edit in biased])  # (row, id) pairs are distinct


def forbid_ends(logits: Tensor, edits: Sequence[tuple[int, LogitEdits]]) -> None:
    """In place: −inf at each row's `end_ids`."""
    rows = _repeat([(row, len(edit.end_ids)) for row, edit in edits], logits.device)
    logits[rows, torch.cat([edit.end_index for _, edit in edits])] = float("-inf")


def _repeat(counts: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.cat([torch.full((n,), row, device=device) for row, n in counts])
