"""Logprobs of given tokens and of each row's best: raw log-softmax of the logits, before temperature and penalties.

Used for the tokens just sampled and for prompt positions alike. Works through the rows in passes, so temporaries stay
small however many prompt rows there are. Called by `engine/sampling/sampler.py` and `engine/execution/runner.py`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from multilora.transfer import download

_PASS_ELEMENTS = 2**22
_LOW32 = 2**32 - 1


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Still on the device. `tokens` fp32 [rows]; `top_values` fp32 and `top_ids` int64 [rows, k], best first."""

    tokens: Tensor
    top_values: Tensor
    top_ids: Tensor

    def to_cpu(self) -> "TokenLogprobs":
        """Start to copy to the host: what comes back is complete once a `Fence` made afterwards has passed."""
        return TokenLogprobs(download(self.tokens), download(self.top_values), download(self.top_ids))

    def to_host(self) -> tuple[list[float | None], list[list[tuple[float, int]]]]:
        """(logprobs, top logprobs). What is not finite (a padded vocabulary, NaN) becomes None, or is left out."""
        chosen = [x if math.isfinite(x) else None for x in self.tokens.tolist()]
        rows = zip(self.top_values.tolist(), self.top_ids.tolist(), strict=True)
        tops = [[(v, i) for v, i in zip(values, ids, strict=True) if math.isfinite(v)] for values, ids in rows]
        return chosen, tops


@torch.inference_mode()
def token_logprobs(logits: Tensor, ids: Tensor, top_k: int) -> TokenLogprobs:
    """Logprobs under logits [rows, vocab] of `ids`, int64 [rows], and of the `top_k` best (ties: lowest id first).

    For a prompt: the logits of positions s, s + 1, … and the tokens of positions s + 1, s + 2, …
    """
    rows, vocab = logits.shape
    k = min(top_k, vocab)
    tokens = torch.empty(rows, device=logits.device)
    top_values = torch.empty(rows, k, device=logits.device)
    top_ids = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    step = max(1, _PASS_ELEMENTS // vocab)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        some = logits[part].float()
        logprobs = some.log_softmax(-1)
        tokens[part] = logprobs.gather(1, ids[part, None])[:, 0]
        if k:
            top_ids[part] = _top_ids(some, k)
            top_values[part] = logprobs.gather(1, top_ids[part])
    return TokenLogprobs(tokens, top_values, top_ids)


def _top_ids(logits: Tensor, k: int) -> Tensor:
    """int64 [rows, k]. One integer key, value above and inverted id below, makes ties go to the lowest id."""
    bits = (logits + 0.0).view(torch.int32)  # adding zero turns −0 into 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers in the order of the floats
    below = _LOW32 - torch.arange(logits.shape[1], device=logits.device)
    keys = ((ordered << 32) | below).topk(k, dim=-1).values
    return _LOW32 - (keys & _LOW32)
