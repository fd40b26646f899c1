"""The product of rows with the weights of their experts, for steps in which an expert has few rows: a decode step's.

Such a step is bound by reading the weights of every expert that has a row, once. torch's grouped product computes
tiles of 128 rows and reads at two thirds of what an H200 has; here a program takes some outputs of one expert, and
16 rows at a time. `experts.py` holds it against a plain loop, and chooses.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from multilora.kernels.integers import cdiv
from multilora.kernels.triton_launch import can_launch_early, launch, wait_for_previous

MOST_ROWS = 32
"""Rows of an expert, on the average, up to which this kernel is taken. It was measured against torch's product with
up to 4 (`python -m bench.few_rows --only experts`); beyond that the number is a guess."""


@dataclass(frozen=True)
class GroupedBlocks:
    """Block sizes: rows, outs, columns of one `tl.dot`; swapped: the weight is its first operand."""

    rows: int
    outs: int
    columns: int
    swapped: bool
    warps: int = 4
    stages: int = 4


BLOCKS = GroupedBlocks(16, 128, 64, swapped=True, stages=5)


@triton.jit
def _grouped_product(x_ptr, weight_ptr, ends_ptr, out_ptr, outs, width, BM: tl.constexpr, BN: tl.constexpr,
                     BK: tl.constexpr, SWAPPED: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per (BN outputs, expert). EVEN: the width is a multiple of BK."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    expert = tl.program_id(1)
    k = tl.arange(0, BK)
    row_of_weight = expert.to(tl.int64) * outs + tl.minimum(n, outs - 1)
    weight_at = weight_ptr + row_of_weight[:, None] * width + k[None, :]
    wait_for_previous(PDL)
    first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    for start in range(first, end, BM):
        m = start + tl.arange(0, BM)
        x_at = x_ptr + tl.minimum(m, end - 1).to(tl.int64)[:, None] * width + k[None, :]
        sums = tl.zeros((BN, BM) if SWAPPED else (BM, BN), tl.float32)
        for column in range(0, width, BK):
            if EVEN:
                weight = tl.load(weight_at + column)
                x = tl.load(x_at + column)
            else:
                inside = (k < width - column)[None, :]
                weight = tl.load(weight_at + column, mask=inside, other=0.0)
                x = tl.load(x_at + column, mask=inside, other=0.0)
            if SWAPPED:
                sums = tl.dot(weight, tl.trans(x), sums, input_precision="ieee")
            else:
                sums = tl.dot(x, tl.trans(weight), sums, input_precision="ieee")
        y = tl.trans(sums) if SWAPPED else sums
        at = out_ptr + m.to(tl.int64)[:, None] * outs + n[None, :]
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=(m < end)[:, None] & (n < outs)[None, :])


def grouped_product(
    x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, blocks: GroupedBlocks = BLOCKS
) -> torch.Tensor:
    """x: [rows, in], sorted by expert; weight: [experts, out, in]; ends: int32 [experts], the row after each one's
    last; all contiguous. Returns [rows, out], in which rows from the last end on are not written."""
    (rows, width), (experts, outs, _) = x.shape, weight.shape
    out = torch.empty(rows, outs, dtype=x.dtype, device=x.device)
    early = can_launch_early(x.device)
    constants = {
        "BM": blocks.rows,
        "BN": blocks.outs,
        "BK": blocks.columns,
        "SWAPPED": blocks.swapped,
        "EVEN": width % blocks.columns == 0,
        "PDL": early,
    }
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    grid = cdiv(outs, blocks.outs), experts
    launch(_grouped_product, grid, (x, weight, ends, out, outs, width), constants, early=early, **options)
    return out
