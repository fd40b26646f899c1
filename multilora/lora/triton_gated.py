"""The expand of gate and up inside their activation: y is read once, and only silu(gate) · up is written.

It serves large steps only. The result is that of `expand_kernel` followed by the activation of
`layers/triton_ops.py`, to the bit: each value is rounded where those two round it. Called by `triton_backend.py`,
after the site's shrink.

                  0                width                 2 · width              0                width
    y  [rows]     | gate, raw      | up, raw             |          ->   out    | silu(gate) · up |
                       + h B_gate        + h B_up   (then the scale-shift pairs), each rounded

    program (tile, block): the rows of a tile, BLOCK_N columns of out, TILE_N at a time

Every row of y must be in out, so the table lists all rows of the step. A tile has
    no adapter    base rows, and single rows, whose adapter has been added to y by a launch of its own
    one           h is summed once for all columns of the program, for gate and for up
    several       composed rows: adapter by adapter, h summed anew for each TILE_N columns
"""

import triton
import triton.language as tl

from multilora.kernels.triton_math import silu_times
from multilora.lora.triton_kernels import first_h, rows_sum, tile_after
from multilora.lora.triton_panels import TILE_WORDS, load_block, load_entry, load_slice, load_tile

_TILE_WORDS = tl.constexpr(TILE_WORDS)


@triton.jit
def gated_base(y, out, rows, n0, n_end, width, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
               FAST: tl.constexpr):  # fmt: skip
    """Rows without an adapter to add, columns [n0, n_end) of out."""
    m = tl.arange(0, TILE_M)
    for n in range(n0, n_end, TILE_N):
        col = n + tl.arange(0, TILE_N)
        inside = (m < rows)[:, None] & (col < width)[None, :]
        at = y + m[:, None] * (2 * width) + col[None, :]
        gate, up = tl.load(at, mask=inside, other=0.0), tl.load(at + width, mask=inside, other=0.0)
        tl.store(out + m[:, None] * width + col[None, :], silu_times(gate, up, FAST), mask=inside)


@triton.jit
def gated_tile(y, out, rows, h, h_stride, h_split, splits, weights, addresses, record, weight, n0, n_end, width,
               cut, UNCUT: tl.constexpr, ALIGN: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
               TILE_R: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Rows of one adapter. A slice that it does not touch has rank 0: its h is zero, and y stays as it is."""
    m, r = tl.arange(0, TILE_M), tl.arange(0, TILE_R)
    kind: tl.constexpr = weights.dtype.element_ty
    _, first0, rank0, scale_shift0, start0 = load_slice(record, 0)
    _, first1, rank1, scale_shift1, start1 = load_slice(record, 1)
    h0, h1 = h + first0, h + first1
    hs0, next0 = first_h(h0, h_stride, h_split, splits, weight, rank0, rows, kind, TILE_M, TILE_R)
    hs1, next1 = first_h(h1, h_stride, h_split, splits, weight, rank1, rows, kind, TILE_M, TILE_R)
    for n in range(n0, n_end, TILE_N):
        col = n + tl.arange(0, TILE_N)
        inside = (m < rows)[:, None] & (col < width)[None, :]
        at = y + m[:, None] * (2 * width) + col[None, :]
        gate, up = tl.load(at, mask=inside, other=0.0), tl.load(at + width, mask=inside, other=0.0)
        b0 = load_block(weights, addresses, start0, r, rank0, col, width, cut, UNCUT, ALIGN)
        b1 = load_block(weights, addresses, start1, r, rank1, col, width, cut, UNCUT, ALIGN)
        gate = tile_after(gate, hs0, next0, b0, weight, rows, h0, h_stride, h_split, splits, weights, addresses,
                          start0, rank0, scale_shift0, col, width, cut, UNCUT, ALIGN, TILE_M, TILE_R)  # fmt: skip
        up = tile_after(up, hs1, next1, b1, weight, rows, h1, h_stride, h_split, splits, weights, addresses, start1,
                        rank1, scale_shift1, col, width, cut, UNCUT, ALIGN, TILE_M, TILE_R)  # fmt: skip
        tl.store(out + m[:, None] * width + col[None, :], silu_times(gate, up, FAST), mask=inside)


@triton.jit
def gated_rows(y, out, rows, h, h_stride, h_split, splits, weights, addresses, records, tile, entries, further, count,
               site, sites, n0, n_end, width, cut, RECORD: tl.constexpr, UNCUT: tl.constexpr, ALIGN: tl.constexpr,
               TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Rows of several adapters. (None of those has a scale-shift pair.)"""
    m = tl.arange(0, TILE_M)
    for n in range(n0, n_end, TILE_N):
        col = n + tl.arange(0, TILE_N)
        inside = (m < rows)[:, None] & (col < width)[None, :]
        at = y + m[:, None] * (2 * width) + col[None, :]
        gate, up = tl.load(at, mask=inside, other=0.0), tl.load(at + width, mask=inside, other=0.0)
        total, _ = rows_sum(rows, h, h_stride, h_split, splits, weights, addresses, records, tile, entries, further,
                            count, site, sites, 0, col, width, cut, RECORD, UNCUT, ALIGN, TILE_M, TILE_R,
                            TILE_N)  # fmt: skip
        gate = (gate.to(tl.float32) + total).to(gate.dtype)
        total, _ = rows_sum(rows, h, h_stride, h_split, splits, weights, addresses, records, tile, entries, further,
                            count, site, sites, 1, col, width, cut, RECORD, UNCUT, ALIGN, TILE_M, TILE_R,
                            TILE_N)  # fmt: skip
        up = (up.to(tl.float32) + total).to(up.dtype)
        tl.store(out + m[:, None] * width + col[None, :], silu_times(gate, up, FAST), mask=inside)


@triton.jit(do_not_specialize=["site", "splits"])
def gated_kernel(y, out, site, h, weights, addresses, records, tiles, entries, sites, width, cut, h_split, splits,
                 RECORD: tl.constexpr, UNCUT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr,
                 TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """y: [rows, 2 · width], out: [rows, width]. Grid (tiles, blocks of BLOCK_N columns of out)."""
    tile = tiles + tl.program_id(0) * _TILE_WORDS
    row, h_start, h_stride, rows, count, further, _, _ = load_tile(tile)
    n0 = tl.program_id(1) * BLOCK_N
    n_end = tl.minimum(n0 + BLOCK_N, width)
    y += row * 2 * width
    out += row * width
    h += h_start
    if count == 0:
        if rows > 0:  # else there is no such tile
            gated_base(y, out, rows, n0, n_end, width, TILE_M, TILE_N, FAST)
    elif count == 1:
        slot, weight = load_entry(tile, entries, further, 0)
        record = records + (slot * sites + site) * RECORD
        gated_tile(y, out, rows, h, h_stride, h_split, splits, weights, addresses, record, weight, n0, n_end, width,
                   cut, UNCUT, ALIGN, TILE_M, TILE_N, TILE_R, FAST)  # fmt: skip
    else:
        gated_rows(y, out, rows, h, h_stride, h_split, splits, weights, addresses, records, tile, entries, further,
                   count, site, sites, n0, n_end, width, cut, RECORD, UNCUT, ALIGN, TILE_M, TILE_N,
                   TILE_R, FAST)  # fmt: skip
