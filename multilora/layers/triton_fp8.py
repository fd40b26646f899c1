"""FP8 on CUDA: rounding rows to 8-bit floats in one kernel, and the product of what has a scale for each block.

`weights/fp8_arithmetic.py` is the specification. A product over a block of columns is one `tl.dot` of 8-bit floats,
whose sum is scaled by the row's and the weight's scale of that block before it is added in fp32. Hopper's matrix
units keep about 14 bits of a sum of such products, so these are added in fp32 after every `EXACT` columns.
"""

import torch
import triton
import triton.language as tl

from multilora.kernels.integers import cdiv, power_of_two
from multilora.kernels.triton_launch import can_launch_early, launch, wait_for_previous

LARGEST: tl.constexpr = tl.constexpr(448.0)
LEAST: tl.constexpr = tl.constexpr(1e-10)
EXACT: tl.constexpr = tl.constexpr(32)  # columns of one instruction
FEW_ROWS = 64  # up to which a program takes few columns, so that all of the GPU reads weights


@triton.jit
def _quantise(x_ptr, q_ptr, scale_ptr, x_row, width, group, groups, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program per (row, group of columns)."""
    wait_for_previous(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * group + tl.arange(0, BLOCK)
    mask = (tl.arange(0, BLOCK) < group) & (i < width)
    x = tl.load(x_ptr + row * x_row + i, mask=mask, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), axis=0), LEAST), LARGEST)
    q = tl.clamp(tl.div_rn(x, tl.zeros_like(x) + scale), -LARGEST, LARGEST)
    tl.store(q_ptr + row * width + i, q.to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row * groups + part, scale)


@triton.jit
def _blocks_product(x_ptr, x_scale_ptr, weight_ptr, scale_ptr, out_ptr, rows, outs, width, groups, high,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per BM rows and BN outputs. Its columns go by in blocks of BK, each with a scale of its own.

    groups: of columns, for each row; high: rows of the weight that share a scale.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    n_in, m_in = n < outs, m < rows
    weight_at = weight_ptr + n.to(tl.int64)[None, :] * width + k[:, None]
    x_at = x_ptr + m.to(tl.int64)[:, None] * width + k[None, :]
    scale_at = scale_ptr + (n // high) * groups
    wait_for_previous(PDL)
    sums = tl.zeros((BM, BN), tl.float32)
    for part in range(groups):
        k_in = part * BK + k < width
        x = tl.load(x_at + part * BK, mask=m_in[:, None] & k_in[None, :], other=0.0)
        weight = tl.load(weight_at + part * BK, mask=n_in[None, :] & k_in[:, None], other=0.0)
        x_scale = tl.load(x_scale_ptr + m * groups + part, mask=m_in, other=0.0)
        scale = tl.load(scale_at + part, mask=n_in, other=0.0)
        sums += tl.dot(x, weight, max_num_imprecise_acc=EXACT) * x_scale[:, None] * scale[None, :]
    at = out_ptr + m.to(tl.int64)[:, None] * outs + n[None, :]
    tl.store(at, sums.to(out_ptr.dtype.element_ty), mask=m_in[:, None] & n_in[None, :])


def quantise(x: torch.Tensor, group: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8_arithmetic.quantise`. The last dimension of x lies contiguous."""
    rows, width = x.shape
    size = min(group or width, width)
    groups = cdiv(width, size)
    q = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    quantise_into(q, scale, x, size)
    return q, scale


def quantise_into(q: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, size: int) -> None:
    """x: [rows, in]; q: [rows, in], of any dtype; scale: fp32, one for each row and `size` columns."""
    (rows, width), groups = x.shape, scale.shape[1]
    early, block = can_launch_early(x.device), power_of_two(size)
    args = (x, q, scale, x.stride(0), width, size, groups)
    constants = {"BLOCK": block, "PDL": early}
    launch(_quantise, (rows, groups), args, constants, early=early, num_warps=min(16, max(1, block // 512)))


def blocks_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `fp8_arithmetic.blocks_product`. A block has 32 to 256 columns, a power of two."""
    rows, width = x.shape
    outs, (high, wide) = len(weight), block
    out = torch.empty(rows, outs, dtype=dtype, device=x.device)
    bm = min(64, max(16, power_of_two(rows)))
    bn = 32 if rows <= FEW_ROWS else 128
    early = can_launch_early(x.device)
    args = (x, x_scale, weight, scale, out, rows, outs, width, cdiv(width, wide), high)
    constants = {"BM": bm, "BN": bn, "BK": wide, "PDL": early}
    grid = cdiv(outs, bn), cdiv(rows, bm)
    launch(_blocks_product, grid, args, constants, early=early, num_warps=4, num_stages=3)
    return out
