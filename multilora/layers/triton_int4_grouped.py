"""The product of rows with the weights of their experts in 4 bits, whatever the number of rows an expert has.

`weights/int4_grouped.py` is the specification, and calls this. Programs find their expert and tile of rows as those
of `triton_fp8_grouped.py` do. Packed numbers are unpacked and dequantised in registers, where they are the first
operand of `tl.dot`: what a tensor core's instruction can take from there; rows, the second, come from shared memory.
So an expert's packed weights are read once for each tile of its rows, and no dequantised one is ever written.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from multilora.kernels.integers import cdiv, power_of_two
from multilora.kernels.triton_launch import can_launch_early, launch, wait_for_previous
from multilora.layers.triton_fp8_grouped import most_tiles, rows_of_tile


@dataclass(frozen=True)
class Int4GroupedBlocks:
    """Block sizes: rows, outs, columns, which two calls of `tl.dot` share."""

    rows: int
    outs: int
    columns: int
    warps: int = 4
    stages: int = 4


FEW = Int4GroupedBlocks(16, 128, 64, stages=3)
MANY = Int4GroupedBlocks(64, 128, 64, stages=3)
"""Block sizes for few and for many rows of an expert: the best of 72 on an H200, `bench.few_rows --only int4_experts
--sweep`. Up to 4 rows an expert the product takes 0.80 to 0.88 of its time in 16 bit; with 128 rows torch's in 16 bit
is faster."""

FEW_ROWS = 12
"""Rows of an expert, on the average, up to which FEW is taken."""


@triton.jit
def _dequantised(q, zero, scale, PLACE: tl.constexpr, dtype: tl.constexpr):
    """(q - zero) · scale, rounded to `dtype`. q: int32, whole multiples of PLACE, which zero and scale are
    of, too. Integers below 2^23 are the last bits of floats from 2^23 on, so none is converted."""
    wide = (q | 0x4B000000).to(tl.float32, bitcast=True)
    exact = wide - (zero * PLACE + 8388608.0)
    return (exact * (scale * (1.0 / PLACE))).to(dtype)


@triton.jit
def _grouped_product(x_ptr, packed_ptr, scales_ptr, ends_ptr, out_ptr, outs, width, half, group, experts,
                     BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EXPERTS: tl.constexpr,
                     PDL: tl.constexpr):  # fmt: skip
    """One program per (BN outputs, tile of BM rows). half: width / 2; the group is a multiple of BK. scales: a word
    for each, scale in its low half, zero in the high one."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.arange(0, BK // 2)
    k = j // 16 * 32 + j % 16  # the input of a byte's low half; that of the high one is 16 further
    wait_for_previous(PDL)
    expert, start, end = rows_of_tile(ends_ptr, tl.program_id(1), experts, BM, EXPERTS)
    if expert < experts:
        m = start + tl.arange(0, BM)
        n_in = tl.minimum(n, outs - 1)
        packed_at = packed_ptr + (expert.to(tl.int64) * outs + n_in)[:, None] * half + j[None, :]
        x_at = x_ptr + tl.minimum(m, end - 1).to(tl.int64)[:, None] * width + k[None, :]
        scale_at = scales_ptr + expert.to(tl.int64) * (width // group) * outs + n_in
        sums = tl.zeros((BN, BM), tl.float32)
        for column in range(0, width, BK):
            packed = tl.load(packed_at + column // 2)
            word = tl.load(scale_at + column // group * outs)
            low = tl.load(x_at + column)
            high = tl.load(x_at + column + 16)
            scale = (word << 16).to(tl.float32, bitcast=True)[:, None]
            zero = (word & -65536).to(tl.float32, bitcast=True)[:, None]
            bits = packed.to(tl.int32)
            sums = tl.dot(_dequantised(bits & 15, zero, scale, 1, low.dtype), tl.trans(low), sums)
            sums = tl.dot(_dequantised(bits & 240, zero, scale, 16, high.dtype), tl.trans(high), sums)
        at = out_ptr + m.to(tl.int64)[None, :] * outs + n[:, None]
        tl.store(at, sums.to(out_ptr.dtype.element_ty), mask=(n < outs)[:, None] & (m < end)[None, :])


def grouped_product(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    ends: torch.Tensor,
    blocks: Int4GroupedBlocks | None = None,
) -> torch.Tensor:
    """See `int4_grouped.grouped_product`; all contiguous. blocks: instead of those of `blocks_of`; their columns
    divide a group.

    Returns [rows, outs] in the dtype of x, in which rows from the last end on are not written.
    """
    (rows, width), (experts, outs, half) = x.shape, packed.shape
    out = x.new_empty(rows, outs)
    if not rows:
        return out
    group = width // scales.shape[1]
    blocks = blocks or blocks_of(rows, experts, group)
    early = can_launch_early(x.device)
    args = (x, packed, scales.view(torch.int32), ends, out, outs, width, half, group, experts)
    constants = {
        "BM": blocks.rows,
        "BN": blocks.outs,
        "BK": blocks.columns,
        "EXPERTS": power_of_two(max(2, experts)),
        "PDL": early,
    }
    grid = cdiv(outs, blocks.outs), most_tiles(rows, experts, blocks.rows)
    launch(_grouped_product, grid, args, constants, early=early, num_warps=blocks.warps, num_stages=blocks.stages)
    return out


def blocks_of(rows: int, experts: int, group: int) -> Int4GroupedBlocks:
    """The block sizes for so many rows and inputs that share a scale, a multiple of 32."""
    found = FEW if rows / experts <= FEW_ROWS else MANY
    return replace(found, columns=min(found.columns, group & -group))
