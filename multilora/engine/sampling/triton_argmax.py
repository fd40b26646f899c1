"""The argmax of each row of logits on CUDA, its value and whether the row is finite, in one reading.

torch's `amax` and `argmax` each read all logits with one program a row, which is far from what the memory gives where
rows are few. Here programs share a row's columns, and one more per row joins what they found. Called by `sampler.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from multilora.kernels.integers import cdiv, power_of_two
from multilora.kernels.triton_launch import can_launch_early, launch, wait_for_previous

COLUMNS = 4096  # of one program


@triton.jit
def _greatest(x, places, mask):
    """The greatest of these numbers, NaN if one is, and the least of its places: NaN counts as −inf there."""
    is_nan = x != x
    ordered = tl.where(is_nan, float("-inf"), x)
    top = tl.max(ordered, axis=0)
    place = tl.min(tl.where(mask & (ordered == top), places, 0x7FFFFFFF), axis=0)
    return tl.where(tl.max(is_nan.to(tl.int32), axis=0) > 0, float("nan"), top), place


@triton.jit(do_not_specialize=["vocab", "parts"])
def _search(logits_ptr, values_ptr, places_ptr, vocab, row_stride, parts, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program per (row, part of its columns)."""
    wait_for_previous(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    mask = i < vocab
    x = tl.load(logits_ptr + row * row_stride + i, mask=mask, other=float("-inf"))
    value, place = _greatest(x, i, mask)
    tl.store(values_ptr + row * parts + part, value)
    tl.store(places_ptr + row * parts + part, place)


@triton.jit(do_not_specialize=["parts"])
def _join(values_ptr, places_ptr, best_ptr, finite_ptr, tokens_ptr, parts, PARTS: tl.constexpr, PDL: tl.constexpr):
    """One program per row."""
    wait_for_previous(PDL)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    mask = i < parts
    values = tl.load(values_ptr + row * parts + i, mask=mask, other=float("-inf"))
    places = tl.load(places_ptr + row * parts + i, mask=mask, other=0x7FFFFFFF)
    best, token = _greatest(values, places, mask)
    tl.store(best_ptr + row, best)
    tl.store(finite_ptr + row, (tl.abs(best) < float("inf")).to(tl.int8))  # false for NaN
    tl.store(tokens_ptr + row, token.to(tl.int64))


def argmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits: fp32 [rows, vocab], rows contiguous.

    Returns, for each row, its greatest logit, fp32, NaN if any is; whether that is finite, bool; and its token,
    int64, the lowest id among equals.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1, logits.stride()
    parts, device = cdiv(vocab, COLUMNS), logits.device
    values = torch.empty(rows, parts, device=device)
    places = torch.empty(rows, parts, dtype=torch.int32, device=device)
    best = torch.empty(rows, device=device)
    finite = torch.empty(rows, dtype=torch.bool, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    early = can_launch_early(device)
    args = (logits, values, places, vocab, logits.stride(0), parts)
    launch(_search, (rows, parts), args, {"BLOCK": COLUMNS, "PDL": early}, early=early)
    joined = (values, places, best, finite.view(torch.uint8), tokens, parts)
    launch(_join, (rows,), joined, {"PARTS": power_of_two(parts), "PDL": early}, early=early, num_warps=1)
    return best, finite, tokens
