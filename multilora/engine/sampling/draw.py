"""Draws tokens at random: temperature, then top-k, top-p and min-p together, then one uniform number per row.

Probabilities become 52-bit integers before anything is summed. Integer sums do not depend on the order of summation,
so a row's token cannot depend on its neighbours, on the number of threads or on the device's way to reduce (what
remains is the rounding of `softmax` itself, which works row by row). The draw is the inverse of the cumulative
distribution in order of token ids: no sort for plain temperature sampling, and tightening `top_p` moves no token that
stays. Truncation sorts values alone, never ids, which on CPU is an order of magnitude faster.
`processed` gives the logits of that distribution, for logprobs.

This code serves the CPU and specifies `triton_sampling.py`. Called by `sampler.py`.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from multilora.engine.sampling.batch import Column, Kind, Numbers, Source

_ONE = 2.0**52  # the integer weight of probability 1: products with fractions are exact in fp64
_PASS_ELEMENTS = 2**17  # of logits at a time: the cache of a core
_NARROWING = [Column.TEMPERATURE, Column.TOP_P, Column.TOP_K, Column.MIN_P]

RowIndex = npt.NDArray[np.intp]


def draw(logits: Tensor, numbers: Numbers) -> Tensor:
    """int64 [rows]: a token for each row of logits, fp32 [rows, vocab], as `numbers` (see `Column`) want it. A row
    without a finite maximum gives junk within the vocabulary."""
    kinds = numbers[Column.KIND]
    tokens = torch.empty(len(logits), dtype=torch.int64)
    greedy = np.flatnonzero(kinds == Kind.GREEDY)
    tokens[torch.from_numpy(greedy)] = argmax(_select(logits, greedy))
    for kind in (Kind.PLAIN, Kind.TRUNCATED):
        for rows in _passes(np.flatnonzero(kinds == kind), logits.shape[1]):
            tokens[torch.from_numpy(rows)] = _draw_pass(_select(logits, rows), numbers[:, rows])
    return tokens


def processed(raw: Tensor, edited: Tensor, numbers: Numbers) -> Tensor:
    """What each row's logprobs are the log-softmax of, fp32 [rows, vocab], by its `Source`: the logits `raw`; the
    `edited` ones; or these, divided by the temperature, −inf for tokens that top-k, top-p or min-p excludes."""
    out = raw.clone()
    untempered = torch.from_numpy(np.flatnonzero(numbers[Column.SOURCE] == Source.EDITED))
    out[untempered] = edited[untempered]
    for rows in _passes(np.flatnonzero(numbers[Column.SOURCE] == Source.TEMPERED), raw.shape[1]):
        logits, kept = _tempered(_select(edited, rows), numbers[:, rows])[:2]
        out[torch.from_numpy(rows)] = logits if kept is None else logits.masked_fill_(~kept, float("-inf"))
    return out


def argmax(logits: Tensor) -> Tensor:
    """The best token, the lowest id among equals. On CPU numpy's is ten times faster than torch's."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _passes(rows: RowIndex, vocab: int) -> Iterator[RowIndex]:
    step = max(1, _PASS_ELEMENTS // vocab)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _draw_pass(logits: Tensor, numbers: Numbers) -> Tensor:
    """int64 [r] for logits [r, vocab], whose rows are all of one kind."""
    _, kept, weights = _tempered(logits, numbers)
    if kept is not None:
        weights.mul_(kept)
    return _invert(weights, torch.from_numpy(numbers[Column.UNIFORM])[:, None])


def _tempered(logits: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor | None, Tensor]:
    """For logits [r, vocab]: (logits − their maximum) / temperature, fp32; which tokens top-k, top-p and min-p leave,
    bool, None: all; the integer weights of all tokens, int64. Each [r, vocab]."""
    vocab = logits.shape[1]
    temperature, top_p, top_k, min_p = torch.from_numpy(numbers[_NARROWING])[:, :, None]  # each [r, 1]
    tempered = (logits - logits.amax(-1, keepdim=True)).div_(temperature.float())
    probs = tempered.softmax(-1)
    weights = (probs * _ONE).long()
    kept = None
    if (numbers[Column.KIND] != Kind.PLAIN).any():
        count = top_k.clamp(max=vocab).long()
        if (numbers[Column.TOP_P] < 1).any():
            # without top-p all tokens stay, those whose integer weight is 0, too
            nucleus = torch.where(top_p < 1, _nucleus_size(probs, top_p), vocab)
            count = torch.minimum(count, nucleus)
        kept = best(logits, count)
    if (numbers[Column.MIN_P] > 0).any():
        heavy = weights >= (min_p * weights.amax(-1, keepdim=True).double()).ceil_().long()
        kept = heavy if kept is None else kept & heavy
    return tempered, kept, weights


def _nucleus_size(probs: Tensor, top_p: Tensor) -> Tensor:
    """int64 [r, 1]: how many of the likeliest tokens it takes to reach the mass `top_p`."""
    rising = (_sorted(probs) * _ONE).long().cumsum(-1)  # mass of the j + 1 unlikeliest tokens
    total = rising[:, -1:]
    rest = total - (top_p * total.double()).ceil_().long()  # at most this much mass may be left out
    return (probs.shape[1] - torch.searchsorted(rising, rest, right=True)).clamp_(min=1)


def best(logits: Tensor, count: Tensor) -> Tensor:
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


def _select(logits: Tensor, rows: RowIndex) -> Tensor:
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:  # ascending, so these are neighbours: a view will do
        return logits[rows[0] : rows[-1] + 1]
    return logits[torch.from_numpy(rows)]


def _sorted(values: Tensor) -> Tensor:
    """Ascending along the last dimension. numpy's vectorised sort takes a twentieth of the time of torch's."""
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))
