"""One Triton kernel for what stands between the halves of a decoder layer that ranks share: the sum over ranks, the
residual, the norm. The torch code in `norm.py` is its specification, rounding included.
"""

import torch
import triton
import triton.language as tl

from multilora.distributed.exchange import Exchange
from multilora.distributed.triton_exchange import (
    SLOTS,
    exchange_constants,
    pack,
    row_words,
    sum_over_ranks,
    unpack,
    warps,
)
from multilora.kernels.triton_launch import can_launch_early, launch, wait_for_previous


@triton.jit
def _sum_add_rms_norm(x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, buffers_ptr, counts_ptr, stop_ptr, eps,
                      rows, words, size, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PAIR: tl.constexpr,
                      KIND: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr,
                      PDL: tl.constexpr):  # fmt: skip
    """One program per slot. x, residual, out, total: int32 [rows, words]; weight: int32 [words]; all of `size`
    numbers a row."""
    slot = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < words
    w_low, w_high = unpack(tl.load(weight_ptr + i, mask=mask, other=0), PAIR, KIND)
    wait_for_previous(PDL)
    flag = tl.load(counts_ptr + slot)
    for row in range(slot, rows, SLOTS):
        flag += 1
        at = row * words + i
        own = tl.load(x_ptr + at, mask=mask, other=0)
        r_low, r_high = unpack(tl.load(residual_ptr + at, mask=mask, other=0), PAIR, KIND)
        low, high = sum_over_ranks(own, i, mask, slot, flag, buffers_ptr, stop_ptr, WIDTH, PAIR, KIND, RANK, SIZE,
                                   SLOTS)  # fmt: skip
        total = pack(low + r_low, high + r_high, PAIR, KIND)
        tl.store(total_ptr + at, total, mask=mask)
        low, high = unpack(total, PAIR, KIND)
        scale = tl.rsqrt(tl.sum(low * low + high * high, axis=0) / size + eps)
        low = w_low * (low * scale).to(KIND).to(tl.float32)
        high = w_high * (high * scale).to(KIND).to(tl.float32)
        tl.store(out_ptr + at, pack(low, high, PAIR, KIND), mask=mask)
    tl.store(counts_ptr + slot, flag)


def sum_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, exchange: Exchange
) -> tuple[torch.Tensor, torch.Tensor]:
    """x: this rank's share, and residual: [rows, size], contiguous, which `exchange` has room for. Returns
    (norm(Σ x + residual), Σ x + residual), the sum over all ranks' x."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    words = row_words(x)
    early = can_launch_early(x.device)
    tensors = [t.view(torch.int32) for t in (x, residual, weight, out, total)]
    args = (*tensors, exchange.buffers, exchange.counts, exchange.stop, eps, x.shape[0], words, x.shape[1])
    constants = exchange_constants(x, exchange.rank, exchange.size, exchange.width) | {"PDL": early}
    grid = (min(SLOTS, x.shape[0]),)
    launch(_sum_add_rms_norm, grid, args, constants, early=early, num_warps=warps(words))
    return out, total
