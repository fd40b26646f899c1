"""The LoRA kernels of experts: shrink and expand as in `triton_kernels.py`, with the weights of a row's own expert.

Rows are sorted by (expert, segment), on the device, so the host knows neither where groups begin nor how many there
are. There is a program for every row, which looks at its neighbours: it works if a tile begins at its row, and else
ends at once. A tile begins where a group does and at every TILE_M-th row of all.

    rows       0  1  2  3  4  5  6  7  8  9 …          TILE_M = 4
    group      a  a  b  b  b  b  b  c  -  d            -: no adapter
    tile       0     2     4        7     9

    h          fp32 [splits, rows, h_stride]: the partial sums of a row; ranks of its adapters follow each other
    groups     int32 [segments, 8]: a tile of `triton_steps.py` without its rows, so that `load_entry` reads it

The matrices of expert e begin e · stride addresses after the first one's; a matrix that all share has stride 0.
`triton_experts.py` launches.
"""

import triton
import triton.language as tl

from multilora.lora.triton_kernels import shrink_row, shrink_rows, sum_h
from multilora.lora.triton_panels import TILE_WORDS, load_block, load_entry

_TILE_WORDS = tl.constexpr(TILE_WORDS)
_GRANULE = tl.constexpr(8)


@triton.jit
def tile_at(row, num_rows, experts, segments, TILE_M: tl.constexpr):
    """Expert, segment and number of rows of the tile that begins at `row`; no rows: none begins there."""
    expert, segment = tl.load(experts + row), tl.load(segments + row)
    before = tl.maximum(row - 1, 0)
    inside = (tl.load(experts + before) == expert) & (tl.load(segments + before) == segment) & (row % TILE_M > 0)
    m = row + tl.arange(0, TILE_M)
    near = (m < num_rows) & (m < (row // TILE_M + 1) * TILE_M)
    same = (tl.load(experts + m, mask=near, other=-1) == expert) & (tl.load(segments + m, mask=near) == segment)
    rows = tl.sum((near & same).to(tl.int32))
    return expert.to(tl.int32), segment.to(tl.int32), tl.where(inside | (segment == 0), 0, rows)


@triton.jit(do_not_specialize=["site", "num_rows"])
def expert_shrink_kernel(x, experts, segments, site, h, weights, addresses, records, groups, entries, num_rows, sites,
                         width, cut, h_stride, h_split, RECORD: tl.constexpr, UNCUT: tl.constexpr,
                         ALIGN: tl.constexpr, VECTOR: tl.constexpr, BLOCK_K: tl.constexpr, TILE_M: tl.constexpr,
                         TILE_K: tl.constexpr, TILE_R: tl.constexpr):  # fmt: skip
    """x: [rows, width]. Grid (rows, splits)."""
    row = tl.program_id(0)
    expert, segment, rows = tile_at(row, num_rows, experts, segments, TILE_M)
    if rows > 0:
        group = groups + (segment - 1) * _TILE_WORDS
        count, further = tl.load(group + 1) >> 16, tl.load(group + 4)
        k0 = tl.program_id(1) * BLOCK_K
        x += row.to(tl.int64) * width
        h += tl.program_id(1).to(tl.int64) * h_split + row.to(tl.int64) * h_stride
        for e in range(count):
            slot, _ = load_entry(group, entries, further, e)
            record = records + (slot * sites + site) * RECORD
            rank = tl.multiple_of(tl.load(record + 1), _GRANULE)
            start = tl.load(record) + expert * tl.load(record + 4)
            if VECTOR and rows == 1:
                if rank > 0:
                    shrink_row(x, h, 0, weights, addresses, start, rank, k0, width, cut, UNCUT, ALIGN, BLOCK_K, 1,
                               False)  # fmt: skip
            else:
                shrink_rows(x, width, rows, h, h_stride, 0, 1, weights, addresses, start, rank, k0, k0 + BLOCK_K,
                            width, cut, UNCUT, ALIGN, TILE_M, TILE_R, TILE_K, False)  # fmt: skip
            h += rank


@triton.jit(do_not_specialize=["site", "num_rows", "splits"])
def expert_expand_kernel(y, experts, segments, site, h, weights, addresses, records, groups, entries, num_rows, sites,
                         width, cut, h_stride, h_split, splits, RECORD: tl.constexpr, UNCUT: tl.constexpr,
                         ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
                         TILE_R: tl.constexpr):  # fmt: skip
    """y: [rows, width]. Grid (rows, blocks of BLOCK_N columns)."""
    row = tl.program_id(0)
    expert, segment, rows = tile_at(row, num_rows, experts, segments, TILE_M)
    if rows > 0:
        group = groups + (segment - 1) * _TILE_WORDS
        n0 = tl.program_id(1) * BLOCK_N
        y += row.to(tl.int64) * width
        h += row.to(tl.int64) * h_stride
        for n in range(n0, tl.minimum(n0 + BLOCK_N, width), TILE_N):
            expand_columns(y, rows, expert, h, weights, addresses, records, group, entries, site, sites, n, width,
                           cut, h_stride, h_split, splits, RECORD, UNCUT, ALIGN, TILE_M, TILE_N, TILE_R)  # fmt: skip


@triton.jit
def expand_columns(y, rows, expert, h, weights, addresses, records, group, entries, site, sites, n, width, cut,
                   h_stride, h_split, splits, RECORD: tl.constexpr, UNCUT: tl.constexpr, ALIGN: tl.constexpr,
                   TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr):  # fmt: skip
    """TILE_N columns of a tile, every adapter: y[m, n] += Σ w Σ h[m, r] B[r, n]."""
    count, further = tl.load(group + 1) >> 16, tl.load(group + 4)
    m, r, col = tl.arange(0, TILE_M), tl.arange(0, TILE_R), n + tl.arange(0, TILE_N)
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    touched = 0
    for e in range(count):
        slot, weight = load_entry(group, entries, further, e)
        record = records + (slot * sites + site) * RECORD
        rank = tl.multiple_of(tl.load(record + 1), _GRANULE)
        start = tl.load(record + 3) + expert * tl.load(record + 5)
        for r0 in range(0, rank, TILE_R):
            hs = sum_h(h, h_stride, h_split, splits, r0 + r, rank, rows, TILE_M, TILE_R) * weight
            b = load_block(weights, addresses, start, r0 + r, rank, col, width, cut, UNCUT, ALIGN)
            total = tl.dot(hs.to(b.dtype), b, total, input_precision="ieee")
        h += rank
        touched += rank
    if touched > 0:
        to = y + m[:, None] * width + col[None, :]
        inside = (m < rows)[:, None] & (col < width)[None, :]
        before = tl.load(to, mask=inside, other=0.0)
        tl.store(to, (before.to(tl.float32) + total).to(before.dtype), mask=inside)
