"""The FP8 product of rows with the weights of their experts, whatever the number of rows an expert has.

`weights/fp8_arithmetic.py` is the specification, and calls this. A program takes some outputs of one expert for one
tile of its rows. Which expert and which rows those are, it finds from where each expert's rows end:

    ends          3        3                    10  12     experts 0 to 3, tiles of 4 rows
    tiles       | 0 |    none    | 1 (3..6)  2 (7..9) | 3 |

so the host only needs to know how many tiles there can be at most, and programs that find none end at once. Up to a
tile's rows an expert is read once; its other tiles come right after it and find it in the L2 cache.

Hopper's matrix units keep about 14 bits of a sum of products, so these are added in fp32 after every `EXACT` columns.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from multilora.kernels.integers import cdiv, power_of_two
from multilora.kernels.triton_launch import can_launch_early, launch, shared_memory, wait_for_previous
from multilora.layers.triton_fp8 import EXACT


@dataclass(frozen=True)
class Fp8GroupedBlocks:
    """Block sizes: rows, outs, columns of one `tl.dot`; swapped: the weight is its first operand, of which Hopper's
    matrix units take 64 rows at least."""

    rows: int
    outs: int
    columns: int
    swapped: bool
    warps: int = 4
    stages: int = 4

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one iteration's operands."""
        return (self.rows + self.outs) * self.columns


FEW = Fp8GroupedBlocks(16, 128, 128, swapped=True, stages=6)
MANY = Fp8GroupedBlocks(64, 256, 128, swapped=False, warps=8, stages=5)
"""Block sizes for few and for many rows of an expert: the best of 64 on an H200, `bench.few_rows --only fp8_experts
--sweep`. They read Qwen3-30B-A3B's experts at 65 to 98 % of the bandwidth up to 4 rows each."""

FEW_ROWS = 12
"""Rows of an expert, on the average, up to which FEW is taken."""

FEWEST_OUTS = 32
SPARE_BYTES = 3 << 10
"""Shared memory that a program needs beside the operands of its iterations."""


@triton.jit
def rows_of_tile(ends_ptr, tile, experts, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """Returns the expert of a tile (`experts`: there is no such tile), its first row, and the row after the last of
    the expert."""
    e = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + e, mask=e < experts, other=0)
    firsts = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < experts), other=0)
    tiles = (ends - firsts + (BM - 1)) // BM  # none of experts that there are not
    expert = tl.minimum(tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0), experts)
    before = tl.sum(tl.where(e < expert, tiles, 0), axis=0)
    first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert, mask=expert < experts, other=0)
    return expert, first + (tile - before) * BM, end


@triton.jit
def _grouped_product(x_ptr, x_scale_ptr, weight_ptr, scale_ptr, ends_ptr, out_ptr, outs, width, experts, groups, high,
                     BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EXPERTS: tl.constexpr,
                     BLOCKED: tl.constexpr, SWAPPED: tl.constexpr, EVEN: tl.constexpr,
                     PDL: tl.constexpr):  # fmt: skip
    """One program per (BN outputs, tile of BM rows). BLOCKED: rows have a scale for each BK columns, of the weight
    `high` rows share them; else every row has one, and `groups` is 1. EVEN: the width is a multiple of BK."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    wait_for_previous(PDL)
    expert, start, end = rows_of_tile(ends_ptr, tl.program_id(1), experts, BM, EXPERTS)
    if expert < experts:
        m = start + tl.arange(0, BM)
        n_in = tl.minimum(n, outs - 1)
        m_in = tl.minimum(m, end - 1).to(tl.int64)
        weight_at = weight_ptr + (expert.to(tl.int64) * outs + n_in)[:, None] * width + k[None, :]
        x_at = x_ptr + m_in[:, None] * width + k[None, :]
        x_scale_at = x_scale_ptr + m_in * groups
        scale_at = scale_ptr + (expert.to(tl.int64) * tl.cdiv(outs, high) + n_in // high) * groups
        sums = tl.zeros((BN, BM) if SWAPPED else (BM, BN), tl.float32)
        for column in range(0, width, BK):
            if EVEN:
                weight = tl.load(weight_at + column)
                x = tl.load(x_at + column)
            else:
                inside = (k < width - column)[None, :]
                weight = tl.load(weight_at + column, mask=inside, other=0.0)
                x = tl.load(x_at + column, mask=inside, other=0.0)
            if BLOCKED:
                x_part = tl.load(x_scale_at + column // BK)
                part = tl.load(scale_at + column // BK)
                if SWAPPED:
                    dot = tl.dot(weight, tl.trans(x), max_num_imprecise_acc=EXACT)
                    sums += dot * part[:, None] * x_part[None, :]
                else:
                    dot = tl.dot(x, tl.trans(weight), max_num_imprecise_acc=EXACT)
                    sums += dot * x_part[:, None] * part[None, :]
            elif SWAPPED:
                sums = tl.dot(weight, tl.trans(x), sums, max_num_imprecise_acc=EXACT)
            else:
                sums = tl.dot(x, tl.trans(weight), sums, max_num_imprecise_acc=EXACT)
        y = tl.trans(sums) if SWAPPED else sums
        if not BLOCKED:
            y = y * tl.load(x_scale_at)[:, None] * tl.load(scale_at)[None, :]
        at = out_ptr + m.to(tl.int64)[:, None] * outs + n[None, :]
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=(m < end)[:, None] & (n < outs)[None, :])


def grouped_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    ends: torch.Tensor,
    block: tuple[int, int] | None,
    dtype: torch.dtype,
    blocks: Fp8GroupedBlocks | None = None,
) -> torch.Tensor:
    """See `fp8_arithmetic.grouped_product`; all contiguous. block: rows and columns of the weight that share a scale,
    the columns 32 to 256, a power of two; None: each row has one. blocks: instead of those of `blocks_of`.

    Returns [rows, out], in which rows from the last end on are not written.
    """
    (rows, width), (experts, outs, _) = x.shape, weight.shape
    out = torch.empty(rows, outs, dtype=dtype, device=x.device)
    if not rows:
        return out
    blocks = blocks or blocks_of(rows, experts, None if block is None else block[1], shared_memory(x.device))
    early = can_launch_early(x.device)
    args = (x, x_scale, weight, scale, ends, out, outs, width, experts, scale.shape[2], block[0] if block else 1)
    constants = {
        "BM": blocks.rows,
        "BN": blocks.outs,
        "BK": blocks.columns,
        "EXPERTS": power_of_two(max(2, experts)),
        "BLOCKED": block is not None,
        "SWAPPED": blocks.swapped,
        "EVEN": width % blocks.columns == 0,
        "PDL": early,
    }
    grid = cdiv(outs, blocks.outs), most_tiles(rows, experts, blocks.rows)
    launch(_grouped_product, grid, args, constants, early=early, num_warps=blocks.warps, num_stages=blocks.stages)
    return out


def most_tiles(rows: int, experts: int, height: int) -> int:
    """How many tiles of `height` rows there are at most, however `rows` rows are spread over the experts."""
    return min(rows, experts) + rows // height


def blocks_of(rows: int, experts: int, columns: int | None, shared: int) -> Fp8GroupedBlocks:
    """The block sizes for so many rows. columns: which share a scale; None: all of a row do; shared: bytes of shared
    memory that a program can have."""
    found = FEW if rows / experts <= FEW_ROWS else MANY
    found = replace(found, columns=columns or found.columns)
    room = shared - SPARE_BYTES
    while found.stage_bytes * 2 > room and found.outs > FEWEST_OUTS:
        found = replace(found, outs=found.outs // 2)
    return replace(found, stages=max(1, min(found.stages, room // found.stage_bytes)))
