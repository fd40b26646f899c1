"""Sampling on CUDA: the same results as `edits.py`, `draw.py` and `logprobs.py`, without a sort and without waiting.

A row is cut where top-k or top-p ends: at a key (the logit as an ordered integer), with a quota of the tokens that
have just this key, the lowest ids first. The search for it goes by counts and weights at once:

    narrow × PASSES   all logits, on all multiprocessors: how many, and how heavy, from each of BUCKETS pivots on
    collect           the few logits between the pivots that remain
    select            one program per row bisects these: exact, to the last bit

then `weigh` sums weights per block of tokens and `choose` inverts the cumulative distribution by blocks, then within
one. A greedy row is one cut at its maximum, with a quota of 1.

Why not FlashInfer's `top_k_renorm_probs` and `top_p_renorm_probs`: they keep every token that equals the pivot, while
of equals only the lowest ids may stay here (logits that were bf16 have many equals), and they sum and renormalize
floats, so that what top-p keeps is decided by rounding, and differently from the specification.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from multilora.engine.sampling import triton_edit_kernels
from multilora.engine.sampling import triton_kernels as kernels
from multilora.engine.sampling.batch import Column, Kind
from multilora.engine.sampling.edits import EditTables
from multilora.kernels.triton_launch import can_launch_early, launch

PASSES, BUCKETS, CANDIDATES = 3, 8, 8192
NARROW_BLOCK, COLLECT_BLOCK, SELECT_BLOCK, DRAW_BLOCK, EMIT_BLOCK, EDIT_BLOCK, BIAS_BLOCK = (
    4096, 4096, 4096, 2048, 8192, 2048, 128,
)  # fmt: skip


def edited(
    logits: Tensor, numbers: Tensor, tables: EditTables, masks: Tensor | None, vocab_size: int, *, biases: bool
) -> Tensor:
    """As `edits.edited`. numbers: on the device. biases: whether any row has some."""
    rows, vocab = logits.shape
    early = can_launch_early(logits.device)
    out = torch.empty(rows, vocab, device=logits.device)
    words = 0 if masks is None else masks.shape[1]
    launch(
        triton_edit_kernels.edit,
        (rows, _blocks(vocab, EDIT_BLOCK)),
        (logits, out, numbers, tables.counts, masks, rows, vocab, logits.stride(0), tables.counts.shape[1], words,
         vocab_size),
        {"BLOCK": EDIT_BLOCK, "MASKS": masks is not None, "PDL": early},
        early=early,
    )  # fmt: skip
    if biases:
        ids, values = tables.bias_ids, tables.bias_values
        launch(
            triton_edit_kernels.bias,
            (rows,),
            (out, numbers, ids, values, rows, vocab, ids.shape[1]),
            {"BLOCK": BIAS_BLOCK, "PDL": early},
            early=early,
        )
    return out


class Kept(NamedTuple):
    """Which tokens each row keeps. `cut`, int64 [rows, 2], of rows that truncate: the last kept key and its quota. By
    blocks of tokens, [rows, blocks]: `masses`, int64, the weight above that key; `equals`, int32, how many have it.
    """

    cut: Tensor
    masses: Tensor
    equals: Tensor


def keep(logits: Tensor, best: Tensor, numbers: Tensor, *, truncates: bool) -> Kept:
    """best: fp32 [rows], the maxima of logits fp32 [rows, vocab]. numbers: on the device. truncates: whether any row
    has top-k or top-p."""
    rows, vocab = logits.shape
    early = can_launch_early(logits.device)
    blocks = _blocks(vocab, DRAW_BLOCK)
    masses = torch.empty(rows, blocks, dtype=torch.int64, device=logits.device)
    equals = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    cut = _search(logits, best, numbers) if truncates else masses  # nobody reads it then
    launch(
        kernels.weigh,
        (rows, blocks),
        (logits, best, numbers, cut, masses, equals, rows, vocab, logits.stride(0)),
        {"BLOCK": DRAW_BLOCK, "PDL": early},
        early=early,
    )
    return Kept(cut, masses, equals)


def draw(logits: Tensor, best: Tensor, numbers: Tensor, counts: Tensor, kept: Kept) -> Tensor:
    """int64 [rows]: as `draw.draw`, and count the tokens. Arguments as `keep`'s, whose result `kept` is; counts:
    `EditTables.counts`."""
    rows, vocab = logits.shape
    early = can_launch_early(logits.device)
    blocks = _blocks(vocab, DRAW_BLOCK)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    launch(
        kernels.choose,
        (rows,),
        (logits, best, numbers, *kept, counts, tokens, rows, vocab, logits.stride(0), blocks, counts.shape[1]),
        {"BLOCK": DRAW_BLOCK, "BLOCKS": 1 << (blocks - 1).bit_length(), "PDL": early},
        early=early,
        num_warps=8,
    )
    return tokens


def processed(raw: Tensor, logits: Tensor, best: Tensor, numbers: Tensor, kept: Kept) -> Tensor:
    """As `draw.processed`. Arguments as `keep`'s for the edited `logits`, whose result `kept` is."""
    rows, vocab = logits.shape
    early = can_launch_early(logits.device)
    blocks = _blocks(vocab, DRAW_BLOCK)
    out = torch.empty(rows, vocab, device=logits.device)
    launch(
        kernels.process,
        (rows, blocks),
        (raw, logits, best, numbers, kept.cut, kept.equals, out, rows, vocab, raw.stride(0), logits.stride(0),
         blocks),
        {"BLOCK": DRAW_BLOCK, "BLOCKS": 1 << (blocks - 1).bit_length(), "PDL": early},
        early=early,
    )  # fmt: skip
    return out


def best_ids(logits: Tensor, k: int) -> Tensor:
    """int64 [rows, k]: the ids of the k highest logits fp32 [rows, vocab], the lowest among equals, ascending. A row
    with NaN gives junk within the vocabulary."""
    rows, vocab = logits.shape
    early = can_launch_early(logits.device)
    numbers = torch.zeros(len(Column), rows, dtype=torch.float64, device=logits.device)
    numbers[Column.KIND] = Kind.TRUNCATED
    numbers[Column.TEMPERATURE : Column.TOP_P + 1] = 1.0
    numbers[Column.TOP_K] = k
    cut = _search(logits, logits.amax(-1), numbers)
    ids = torch.zeros(rows, k, dtype=torch.int64, device=logits.device)
    launch(
        kernels.emit,
        (rows,),
        (logits, cut, ids, vocab, logits.stride(0), k),
        {"BLOCK": EMIT_BLOCK, "PDL": early},
        early=early,
        num_warps=16,
    )
    return ids


def _search(logits: Tensor, best: Tensor, numbers: Tensor) -> Tensor:
    """The cut of the rows that truncate, int64 [rows, 2]: the last kept key and its quota."""
    rows, vocab = logits.shape
    early = can_launch_early(logits.device)
    size = (rows, vocab, logits.stride(0))
    states = torch.zeros(PASSES, rows, 4, BUCKETS, dtype=torch.int64, device=logits.device)
    candidates = torch.empty(rows, CANDIDATES, device=logits.device)
    cut = torch.empty(rows, 2, dtype=torch.int64, device=logits.device)
    first, last = states[0], states[PASSES - 1]
    for step in range(PASSES):
        launch(
            kernels.narrow,
            (rows, _blocks(vocab, NARROW_BLOCK)),
            (logits, best, numbers, states[max(step - 1, 0)], states[step], first, *size),
            {"BLOCK": NARROW_BLOCK, "BUCKETS": BUCKETS, "FIRST": step == 0, "PDL": early},
            early=early,
            num_warps=4,
        )
    launch(
        kernels.collect,
        (rows, _blocks(vocab, COLLECT_BLOCK)),
        (logits, numbers, last, first, candidates, *size),
        {"BLOCK": COLLECT_BLOCK, "BUCKETS": BUCKETS, "CAPACITY": CANDIDATES, "PDL": early},
        early=early,
        num_warps=8,
    )
    launch(
        kernels.select,
        (rows,),
        (logits, best, numbers, last, first, candidates, cut, *size),
        {"BLOCK": SELECT_BLOCK, "BUCKETS": BUCKETS, "CAPACITY": CANDIDATES, "PDL": early},
        early=early,
        num_warps=16,
    )
    return cut


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
