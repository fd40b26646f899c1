"""Packing on the GPU: from the bytes of an adapter's file to its pages.

`packing/pack_jobs.py` is the specification, to the bit: each number is scaled in fp32, rounded once, and written
where its panel lies. B comes transposed in files, which CPUs turn at 2 to 3 GB/s a core. Whether all numbers are
finite has been checked before. Called by `packing.py`.
"""

import torch
import triton
import triton.language as tl

from multilora.adapters.pack_table import TABLE_WORDS
from multilora.kernels.integers import cdiv
from multilora.kernels.triton_launch import launch

ROWS, COLUMNS = 16, 256

_WORDS = tl.constexpr(TABLE_WORDS)


@triton.jit
def _pack(raw, arena, table, pages, page_elements, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (row of the table, block of COLUMNS of its columns). raw: a part, in the file's dtype; pages: int64,
    the places of the adapter's pages in the arena, which is in the target dtype."""
    entry = table + tl.program_id(0) * _WORDS
    first, columns = tl.program_id(1) * COLUMNS, tl.load(entry + 4)
    if first < columns:
        source, row, column, rows = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        at, scaling = tl.load(entry + 5), tl.load(entry + 6).to(tl.int32).to(tl.float32, bitcast=True)
        all_rows = tl.load(entry + 7)
        place = tl.load(pages + at // page_elements) * page_elements + at % page_elements
        c = first + tl.arange(0, COLUMNS)
        for start in range(0, all_rows, ROWS):
            r, inside = start + tl.arange(0, ROWS), (c < columns)[None, :]
            mask = (r < rows)[:, None] & inside
            numbers = tl.load(raw + source + r[:, None] * row + c[None, :] * column, mask=mask, other=0.0)
            packed = tl.where(mask, numbers.to(tl.float32) * scaling, 0.0).to(arena.dtype.element_ty)
            tl.store(arena + place + r[:, None] * columns + c[None, :], packed, mask=(r < all_rows)[:, None] & inside)


def pack(raw: torch.Tensor, arena: torch.Tensor, table: torch.Tensor, pages: torch.Tensor, columns: int) -> None:
    """Pack one part on the current stream. raw: [numbers]; arena: [pages, numbers], both in their dtypes; table:
    int64 [stretches, TABLE_WORDS]; pages: int64; columns: the most of a stretch."""
    grid = len(table), cdiv(columns, COLUMNS)
    launch(_pack, grid, (raw, arena, table, pages, arena.shape[1]), {"ROWS": ROWS, "COLUMNS": COLUMNS}, num_warps=4)
