"""Draws tokens at random: temperature, then top-k, top-p and min-p together, then one uniform number per row.

Knows rows of logits and numbers only: no requests, no penalties. Called by `engine/sampling/sampler.py`.

Probabilities become 52-bit integers before anything is summed. Integer sums do not depend on the order of summation,
so a row's token cannot depend on its neighbours, on the number of threads or on the device's way to reduce (what
remains is the rounding of `softmax` itself, which works row by row). The draw is the inverse of the cumulative
distribution in order of token ids: no sort for plain temperature sampling, and tightening `top_p` moves no token that
stays. Truncation sorts values alone, never ids, which on CPU is an order of magnitude faster.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multilora.params import SamplingParams
from multilora.transfer import upload

_ONE = 2.0**52  # the integer weight of probability 1: products with fractions are exact in fp64
_MIN_TEMPERATURE = 1e-20  # below, fp32 division would give 0 / 0; the distribution is the argmax long before
_PASS_ELEMENTS = {"cpu": 2**17, "cuda": 2**25}  # of logits at a time: the cache of a core, a bound on temporaries


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: npt.NDArray[np.float64]) -> Tensor:
    """int64 [rows]: a token for each row of logits, fp32 [rows, vocab]. A row without a finite maximum gives junk."""
    vocab = logits.shape[1]
    tokens = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    ranked = [i for i, p in enumerate(params) if 0 < p.top_k < vocab or p.top_p < 1]
    plain = sorted(set(range(len(params))) - set(ranked))
    for group, truncate in ((plain, False), (ranked, True)):
        for some in _passes(group, logits):
            chosen = _draw_pass(logits, some, [params[i] for i in some], uniforms[some], truncate)
            tokens[upload(some, logits.device)] = chosen
    return tokens


def _passes(rows: list[int], logits: Tensor) -> Iterator[list[int]]:
    step = max(1, _PASS_ELEMENTS[logits.device.type] // logits.shape[1])
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _draw_pass(
    logits: Tensor, rows: list[int], params: list[SamplingParams], uniforms: npt.NDArray[np.float64], truncate: bool
) -> Tensor:
    vocab = logits.shape[1]
    numbers = [
        [max(p.temperature, _MIN_TEMPERATURE) for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        [float(p.top_k if 0 < p.top_k < vocab else vocab) for p in params],
    ]
    host = torch.from_numpy(np.vstack([np.array(numbers), uniforms]))
    temperature, top_p, min_p, top_k, uniform = upload(host, logits.device)[:, :, None]  # each [r, 1]

    logits = _select(logits, rows)  # [r, vocab]
    tempered = (logits - logits.amax(-1, keepdim=True)).div_(temperature.float())
    probs = tempered.softmax(-1)
    weights = (probs * _ONE).long()
    if truncate:
        count = top_k.long()
        if any(p.top_p < 1 for p in params):
            count = torch.minimum(count, _nucleus_size(probs, top_p))
        weights.mul_(_best(logits, count))
    if any(p.min_p > 0 for p in params):
        least = (min_p * weights.amax(-1, keepdim=True).double()).ceil_().long()
        weights.mul_(weights >= least)
    return _invert(weights, uniform)


def _nucleus_size(probs: Tensor, top_p: Tensor) -> Tensor:
    """int64 [r, 1]: how many of the likeliest tokens it takes to reach the mass `top_p`."""
    rising = (_sorted(probs) * _ONE).long().cumsum(-1)  # mass of the j + 1 unlikeliest tokens
    total = rising[:, -1:]
    rest = total - (top_p * total.double()).ceil_().long()  # at most this much mass may be left out
    return (probs.shape[1] - torch.searchsorted(rising, rest, right=True)).clamp_(min=1)


def _best(logits: Tensor, count: Tensor) -> Tensor:
    """bool [r, vocab]: each row's `count` [r, 1] highest logits; among equals the lowest token ids."""
    rising = _sorted(logits)
    last = rising.gather(1, logits.shape[1] - count)  # the lowest logit that stays
    higher = logits.shape[1] - torch.searchsorted(rising, last, right=True)
    equal = logits == last
    return (logits > last) | (equal & (equal.cumsum(-1, dtype=torch.int32) <= count - higher))


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """int64 [r]: the token in whose share of the total weight the number falls, shares in order of token ids."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum((uniform * total.double()).long(), total - 1)
    chosen = torch.searchsorted(cumulative, target, right=True)
    return chosen.clamp_(max=weights.shape[1] - 1)[:, 0]


def _select(logits: Tensor, rows: list[int]) -> Tensor:
    if rows[-1] - rows[0] == len(rows) - 1:  # ascending, so these are neighbours: a view will do
        return logits[rows[0] : rows[-1] + 1]
    return logits[upload(rows, logits.device)]


def _sorted(values: Tensor) -> Tensor:
    """Ascending along the last dimension. numpy's vectorised sort takes a twentieth of the time of torch's on CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values
