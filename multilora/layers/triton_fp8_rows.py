"""Products of a few rows with an FP8 weight that has a scale for each of its rows, bound by reading the weight.

`weights/fp8_arithmetic.py` is the specification. torch's own product of scaled rows computes 128 rows whether there
are as many or one, in as few programs as there are blocks of 128 outputs: on an H200 it reads the weights of
Llama-3.1-8B at 1.4 TB/s where 4 are to be had. Here blocks of outputs are small, and where they are still fewer than
the GPU has multiprocessors, programs share the columns, too: each leaves its sums, and the one that comes last adds
them up, always in the same order.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from multilora.kernels.integers import cdiv
from multilora.kernels.triton_launch import can_launch_early, launch, wait_for_previous
from multilora.layers.triton_fp8 import EXACT


@dataclass(frozen=True)
class RowBlocks:
    """Block sizes of `few_rows_product`. rows, outs, columns: of one `tl.dot`; swapped: the weight is its first
    operand, of which Hopper's matrix units take 64 rows at least; splits: how many programs share the columns."""

    rows: int
    outs: int
    columns: int
    swapped: bool
    warps: int = 4
    stages: int = 4
    splits: int = 1


WIDE, DEEP = 16384, 8192
FEW = {
    16: (
        RowBlocks(16, 64, 128, swapped=True, stages=6, splits=4),
        RowBlocks(16, 64, 256, swapped=True, splits=4),
        RowBlocks(16, 128, 256, swapped=True, warps=8, stages=3),
    ),
    64: (
        RowBlocks(64, 32, 128, swapped=False, stages=5, splits=2),
        RowBlocks(64, 64, 256, swapped=False, stages=3, splits=4),
        RowBlocks(64, 128, 128, swapped=False, warps=8),
    ),
}
"""Block sizes by the most rows: for small weights, for those with DEEP inputs, and for those with WIDE outputs. They
were found on an H200 by `python -m bench.few_rows --sweep`."""

MOST_ROWS = 64
MOST_PROGRAMS, SCRATCH_BYTES = 4096, 16 << 20
"""What products whose columns are shared may need of `_scratch`; a larger one's are not shared."""

_scratch: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
"""By device: the sums that programs leave for each other, and how many have come; one product at a time uses them."""


@triton.jit
def _few_rows_product(x_ptr, x_scale_ptr, weight_ptr, scale_ptr, out_ptr, sums_ptr, counts_ptr, rows, outs, width,
                      BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
                      SWAPPED: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per BN outputs, BM rows and share of the columns. EVEN: a share is a multiple of BK."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    blocks = tl.cdiv(tl.cdiv(width, BK), SPLITS)
    first = tl.program_id(2) * blocks * BK
    weight_at = weight_ptr + tl.minimum(n, outs - 1).to(tl.int64)[:, None] * width + k[None, :]
    x_at = x_ptr + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * width + k[None, :]
    scale = tl.load(scale_ptr + n, mask=n < outs, other=0.0)
    wait_for_previous(PDL)
    x_scale = tl.load(x_scale_ptr + m, mask=m < rows, other=0.0)
    sums = tl.zeros((BN, BM) if SWAPPED else (BM, BN), tl.float32)
    for start in range(first, first + blocks * BK, BK):
        if EVEN:
            weight = tl.load(weight_at + start, eviction_policy="evict_first")
            x = tl.load(x_at + start)
        else:
            inside = (k < width - start)[None, :]
            weight = tl.load(weight_at + start, mask=inside, other=0.0)
            x = tl.load(x_at + start, mask=inside, other=0.0)
        if SWAPPED:
            sums = tl.dot(weight, tl.trans(x), sums, max_num_imprecise_acc=EXACT)
        else:
            sums = tl.dot(x, tl.trans(weight), sums, max_num_imprecise_acc=EXACT)
    if SWAPPED:
        sums = tl.trans(sums)
    last = True
    if SPLITS > 1:
        number = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        i = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        mine = sums_ptr + number.to(tl.int64) * (SPLITS * BM * BN) + i
        tl.store(mine + tl.program_id(2) * (BM * BN), sums)
        tl.debug_barrier()  # all threads' sums are written before the program counts as come
        last = tl.atomic_add(counts_ptr + number, 1, sem="acq_rel") == SPLITS - 1
        if last:
            sums = tl.zeros((BM, BN), tl.float32)
            for split in tl.static_range(SPLITS):
                sums += tl.load(mine + split * (BM * BN), cache_modifier=".cg")
            tl.store(counts_ptr + number, 0)
    if last:
        y = sums * x_scale[:, None] * scale[None, :]
        at = out_ptr + m.to(tl.int64)[:, None] * outs + n[None, :]
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < outs)[None, :])


def few_rows_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    blocks: RowBlocks | None = None,
) -> torch.Tensor:
    """See `fp8_arithmetic.rows_product`; all contiguous. blocks: instead of those of `FEW`."""
    (rows, width), outs = x.shape, len(weight)
    blocks = blocks or blocks_of(rows, outs, width)
    out = torch.empty(rows, outs, dtype=dtype, device=x.device)
    grid = cdiv(outs, blocks.outs), cdiv(rows, blocks.rows), blocks.splits
    sums, counts = None, None
    if blocks.splits > 1:
        sums, counts = _scratch_of(x.device)
        need = grid[0] * grid[1] * blocks.splits * blocks.rows * blocks.outs
        if need > len(sums) or grid[0] * grid[1] > len(counts):
            blocks, grid = replace(blocks, splits=1), (*grid[:2], 1)
    early = can_launch_early(x.device)
    constants = {
        "BM": blocks.rows,
        "BN": blocks.outs,
        "BK": blocks.columns,
        "SPLITS": blocks.splits,
        "SWAPPED": blocks.swapped,
        "EVEN": width % (blocks.columns * blocks.splits) == 0,
        "PDL": early,
    }
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    args = (x, x_scale, weight, scale, out, sums, counts, rows, outs, width)
    launch(_few_rows_product, grid, args, constants, early=early, **options)
    return out


def blocks_of(rows: int, outs: int, width: int) -> RowBlocks:
    """The block sizes for so many rows, MOST_ROWS at most."""
    small, deep, wide = next(found for most, found in FEW.items() if rows <= most)
    return wide if outs >= WIDE else deep if width >= DEEP else small


def _scratch_of(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    if device not in _scratch:
        sums = torch.empty(SCRATCH_BYTES // 4, dtype=torch.float32, device=device)
        _scratch[device] = sums, torch.zeros(MOST_PROGRAMS, dtype=torch.int32, device=device)
    return _scratch[device]
