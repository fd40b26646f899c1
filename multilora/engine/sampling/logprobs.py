"""Logprobs of given tokens and of each row's best, and the rank of a token among all: log-softmax of given logits.

Used for the tokens just sampled and for prompt positions alike. Works through the rows in passes, so temporaries stay
small however many prompt rows there are. Called by `engine/sampling/sampler.py` and `engine/execution/runner.py`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from multilora.engine.messages import Logprobs
from multilora.engine.sampling import triton_sampling
from multilora.transfer import download

_PASS_ELEMENTS = {"cpu": 2**22, "cuda": 2**23}


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Still on the device. `tokens` fp32 [rows]; `top_values` fp32 and `top_ids` int64 [rows, k], best first; `ranks`
    int64 [rows], from 1 on, None where not asked for."""

    tokens: Tensor
    top_values: Tensor
    top_ids: Tensor
    ranks: Tensor | None = None

    def to_cpu(self) -> "TokenLogprobs":
        """Start to copy to the host: what comes back is complete once a `Fence` made afterwards has passed."""
        ranks = None if self.ranks is None else download(self.ranks)
        return TokenLogprobs(download(self.tokens), download(self.top_values), download(self.top_ids), ranks)

    def to_host(self) -> list[Logprobs]:
        """One value per row."""
        tops = zip(self.top_values.tolist(), self.top_ids.tolist(), strict=True)
        ranks = [None] * len(self.tokens) if self.ranks is None else self.ranks.tolist()
        return [
            Logprobs(
                token if math.isfinite(token) else None,
                [(v, i) for v, i in zip(values, ids, strict=True) if math.isfinite(v)],
                rank,
            )
            for token, (values, ids), rank in zip(self.tokens.tolist(), tops, ranks, strict=True)
        ]


@torch.inference_mode()
def token_logprobs(logits: Tensor, ids: Tensor, top_k: int, *, ranks: bool = False) -> TokenLogprobs:
    """Logprobs under logits [rows, vocab] of `ids`, int64 [rows], and of the `top_k` best (ties: lowest id first).

    ranks: whether to count, too, how many tokens come before each of `ids` in that order.

    For a prompt: the logits of positions s, s + 1, … and the tokens of positions s + 1, s + 2, …
    """
    rows, vocab = logits.shape
    k = min(top_k, vocab)
    tokens = torch.empty(rows, device=logits.device)
    top_values = torch.empty(rows, k, device=logits.device)
    top_ids = torch.empty(rows, k, dtype=torch.int64, device=logits.device)
    places = torch.empty(rows, dtype=torch.int64, device=logits.device) if ranks else None
    step = max(1, _PASS_ELEMENTS[logits.device.type] // vocab)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        some = logits[part].float()
        logprobs = some.log_softmax(-1)
        tokens[part] = logprobs.gather(1, ids[part, None])[:, 0]
        if k:
            top_ids[part] = _in_order(some, _best_ids(some, k))
            top_values[part] = logprobs.gather(1, top_ids[part])
        if places is not None:
            places[part] = _ranks(some, ids[part, None])
    return TokenLogprobs(tokens, top_values, top_ids, places)


def _ranks(logits: Tensor, ids: Tensor) -> Tensor:
    """int64 [rows]: the places of `ids` [rows, 1], from 1 on, by falling logit and, among equals, rising id."""
    own = logits.gather(1, ids)
    earlier = torch.arange(logits.shape[1], device=logits.device) < ids
    return 1 + ((logits > own) | ((logits == own) & earlier)).sum(-1)


def _best_ids(logits: Tensor, k: int) -> Tensor:
    """int64 [rows, k]: the ids of the k highest logits, the lowest among equals, ascending. NaN counts as −inf."""
    if logits.is_cuda:
        return triton_sampling.best_ids(logits, k)
    logits = logits.nan_to_num(float("-inf"), float("inf"), float("-inf"))
    last = logits.topk(k, dim=-1).values[:, -1:]
    higher, equal = logits > last, logits == last
    kept = higher | (equal & (equal.cumsum(-1, dtype=torch.int32) <= k - higher.sum(-1, keepdim=True)))
    return kept.nonzero()[:, 1].view(len(logits), k)


def _in_order(logits: Tensor, ids: Tensor) -> Tensor:
    """The same ids, ascending in each row, by falling logit: those of equals stay ascending."""
    order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)
