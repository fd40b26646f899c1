"""Routing of a step's tokens to experts in two Triton kernels, for CUDA: which experts a token takes, and the order
of rows in which experts take them.

The torch code in `experts.py` (`route`, `sort_by_expert`) is the specification. As torch's operations these are some
twenty launches a layer, in which a small step spends a fifth of the time that reading its experts takes. Sorting
counts, for every row, the rows that come before it: n² comparisons, for up to MOST_ROWS rows.
"""

import torch
import triton
import triton.language as tl

from multilora.batch import ExpertRows
from multilora.kernels.integers import cdiv, power_of_two
from multilora.kernels.triton_launch import can_launch_early, launch, wait_for_previous

MOST_ROWS = 4096
BLOCK_ROWS, BLOCK_OTHERS = 64, 256


@triton.jit
def _route(logits_ptr, experts_ptr, weights_ptr, count, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
           BLOCK: tl.constexpr, NORMALISED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per token. Of experts with the same probability the first one is taken."""
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    i, slot = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    inside = i < count
    logits = tl.load(logits_ptr + token * count + i, mask=inside, other=-float("inf")).to(tl.float32)
    shares = tl.exp(logits - tl.max(logits, axis=0))
    total = tl.sum(shares, axis=0)
    shares = tl.where(inside, shares / total, -1.0)
    weights = tl.zeros((SLOTS,), tl.float32)
    experts = tl.zeros((SLOTS,), tl.int64)
    for taken in tl.static_range(TOP_K):
        largest = tl.max(shares, axis=0)
        expert = tl.min(tl.where(shares == largest, i, count - 1), axis=0)  # never beyond, were all of them NaN
        weights = tl.where(slot == taken, largest, weights)
        experts = tl.where(slot == taken, expert.to(tl.int64), experts)
        shares = tl.where(i == expert, -1.0, shares)
    if NORMALISED:
        weights = weights / tl.sum(weights, axis=0)
    weights = tl.where(total == total, weights, total)  # NaN stays NaN, which a maximum passes by
    at = token * TOP_K + slot
    tl.store(experts_ptr + at, experts, mask=slot < TOP_K)
    tl.store(weights_ptr + at, weights.to(weights_ptr.dtype.element_ty), mask=slot < TOP_K)


@triton.jit
def _load(experts_ptr, segments_ptr, i, rows, top_k, first, count, SEGMENTS: tl.constexpr):
    """Expert, counted from `first` on, and segment of rows i. Those held elsewhere come last, as number `count`."""
    expert = tl.load(experts_ptr + i, mask=i < rows, other=0).to(tl.int32) - first
    expert = tl.where((expert >= 0) & (expert < count), expert, count)
    segment = tl.zeros_like(expert)
    if SEGMENTS:
        segment = tl.load(segments_ptr + i // top_k, mask=i < rows, other=0).to(tl.int32)
    return expert, segment


@triton.jit
def _sort(experts_ptr, segments_ptr, tokens_out, experts_out, segments_out, places_out, ends_out, rows, tokens, top_k,
          first, count, SEGMENTS: tl.constexpr, HELD: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
          PDL: tl.constexpr):  # fmt: skip
    """One program per BLOCK_I rows, which finds their places, and then one per BLOCK_I experts, which finds their
    ends: both count rows."""
    wait_for_previous(PDL)
    blocks = tl.cdiv(rows, BLOCK_I)
    if tl.program_id(0) < blocks:
        i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
        expert, segment = _load(experts_ptr, segments_ptr, i, rows, top_k, first, count, SEGMENTS)
        key = expert * (tokens + 1) + segment
        place = tl.zeros((BLOCK_I,), tl.int32)
        for start in range(0, rows, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            other, its_segment = _load(experts_ptr, segments_ptr, j, rows, top_k, first, count, SEGMENTS)
            its_key = (other * (tokens + 1) + its_segment)[None, :]
            before = (its_key < key[:, None]) | ((its_key == key[:, None]) & (j[None, :] < i[:, None]))
            place += tl.sum((before & (j < rows)[None, :]).to(tl.int32), axis=1)
        inside = i < rows
        tl.store(places_out + i, place.to(tl.int64), mask=inside)
        tl.store(tokens_out + place, (i // top_k).to(tl.int64), mask=inside)
        if SEGMENTS:
            if HELD:  # rows of others have no adapter here
                segment = tl.where(expert < count, segment, 0)
                expert = tl.minimum(expert, count - 1)
            tl.store(segments_out + place, segment.to(tl.int64), mask=inside)
        tl.store(experts_out + place, expert.to(tl.int64), mask=inside)
    else:
        expert = (tl.program_id(0) - blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
        end = tl.zeros((BLOCK_I,), tl.int32)
        for start in range(0, rows, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            other, _ = _load(experts_ptr, segments_ptr, j, rows, top_k, first, count, False)
            end += tl.sum(((other[None, :] <= expert[:, None]) & (j < rows)[None, :]).to(tl.int32), axis=1)
        tl.store(ends_out + expert, end, mask=expert < count)


def route(
    logits: torch.Tensor, top_k: int, *, normalised: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `experts.route`. logits: [tokens, experts], contiguous."""
    tokens, count = logits.shape
    experts = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=dtype, device=logits.device)
    early = can_launch_early(logits.device)
    constants = {
        "TOP_K": top_k,
        "SLOTS": power_of_two(top_k),
        "BLOCK": power_of_two(count),
        "NORMALISED": normalised,
        "PDL": early,
    }
    launch(_route, (tokens,), (logits, experts, weights, count), constants, early=early, num_warps=1)
    return experts, weights


def sort_by_expert(
    experts: torch.Tensor, num_experts: int, segments: torch.Tensor | None, held: range | None
) -> ExpertRows:
    """See `experts.sort_by_expert`. experts: int64 [tokens, top_k], contiguous, MOST_ROWS numbers at most."""
    tokens, top_k = experts.shape
    rows, first = experts.numel(), held.start if held is not None else 0
    count = len(held) if held is not None else num_experts
    found = [
        torch.empty(rows, dtype=torch.int64, device=experts.device) for _ in range(3 if segments is not None else 2)
    ]
    places = torch.empty_like(experts)
    ends = torch.empty(count, dtype=torch.int32, device=experts.device)
    early = can_launch_early(experts.device)
    row_of, expert_of, segment_of = (*found, None)[:3]
    args = (experts, segments, row_of, expert_of, segment_of, places, ends, rows, tokens, top_k, first, count)
    constants = {
        "SEGMENTS": segments is not None,
        "HELD": held is not None,
        "BLOCK_I": BLOCK_ROWS,
        "BLOCK_J": BLOCK_OTHERS,
        "PDL": early,
    }
    launch(_sort, (cdiv(rows, BLOCK_ROWS) + cdiv(count, BLOCK_ROWS),), args, constants, early=early, num_warps=4)
    assert row_of is not None and expert_of is not None
    return ExpertRows(row_of, expert_of, ends, places, segment_of)
