"""The LoRA kernels: shrink, h = x Aᵀ of every adapter of a row, and expand, y += w · h B.

This file owns the arithmetic only; `triton_backend.py` launches, `triton_panels.py` reads tables and panels. The
split into shrink and expand over segments of rows follows Punica (Chen et al. 2023, arXiv:2310.18547). Two launches
per site serve all its slices and every adapter of the batch:

    shrink   program (tile, split)     x [rows, a share of the columns] · A [stacked rank, the same columns]
                                       -> h[split], fp32: the partial sums of one split
    expand   program (tile, block)     h summed over the splits, always in the same order; B [rank, block of columns]
                                       -> y [rows, block], added once; then the slice's scale-shift pair, if any

    h of a tile: [row of the tile, column]; the stacked ranks of its adapters follow each other in a row
        composed of q:8 v:8 and q:8   ->   columns  q q q q q q q q v v v v v v v v q q q q q q q q

A tile is some rows of one segment. With VECTOR, a tile of one row and one adapter takes the vector functions:
products and sums are in fp32, the weights are read once, and the next panels are loaded while one is summed. Every
other tile takes `tl.dot`; it may be listed several times, as the parts that share its rank rows (shrink) and its
columns (expand). Ranks are loop bounds read from the records; grids depend on nothing but the number of rows and the
model's widths. There are no atomics: no two programs write the same element.

With PDL (CUDA, compute capability 9) a kernel may start while the one before it still runs: each reads tables and
weights, which that one does not write, and waits before it touches x, h or y. Every program waits, an idle one too,
so that a finished kernel means that all before it have finished.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from multilora.lora.triton_panels import (
    TILE_WORDS,
    load_block,
    load_entry,
    load_panel,
    load_scale_shift,
    load_slice,
    load_tile,
    panel_address,
    prefetch_rows,
)

BLOCK_WORDS = 8  # slice, first column, width, offset in y, cut, three unused

_TILE_WORDS = tl.constexpr(TILE_WORDS)
_BLOCK_WORDS = tl.constexpr(BLOCK_WORDS)
_GRANULE = tl.constexpr(8)


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait for the kernels before this one. These kernels have let the next one start at their very beginning."""
    if PDL:
        gdc_wait()


@triton.jit
def shrink_row(x, h, part, weights, addresses, start, rank, k0, width, cut, UNCUT: tl.constexpr,
               ALIGN: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One row, one adapter, BLOCK_K columns, every PARTS-th panel: h[r] = Σ x[k] A[r, k], two panels in flight."""
    r, panels, k = tl.arange(0, _GRANULE), rank // _GRANULE, k0 + tl.arange(0, BLOCK_K)
    at0 = panel_address(addresses, start, part, panels, UNCUT, ALIGN)
    at1 = panel_address(addresses, start, part + PARTS, panels, UNCUT, ALIGN)
    at2 = panel_address(addresses, start, part + 2 * PARTS, panels, UNCUT, ALIGN)
    now = load_panel(weights, addresses, at0, start, part, panels, k, width, cut, UNCUT, ALIGN)
    next = load_panel(weights, addresses, at1, start, part + PARTS, panels, k, width, cut, UNCUT, ALIGN)
    wait_for_inputs(PDL)
    xs = tl.load(x + k, mask=k < tl.where(rank > 0, width, 0), other=0.0).to(tl.float32)
    for p in range(part, panels, PARTS):
        tl.store(h + p * _GRANULE + r, tl.sum(now.to(tl.float32) * xs[None, :], 1))
        now = next
        next = load_panel(weights, addresses, at2, start, p + 2 * PARTS, panels, k, width, cut, UNCUT, ALIGN)
        at2 = panel_address(addresses, start, p + 3 * PARTS, panels, UNCUT, ALIGN)


@triton.jit
def shrink_rows(x, x_stride, rows, h, h_stride, part, parts, weights, addresses, start, rank, k0, k_end, width, cut,
                UNCUT: tl.constexpr, ALIGN: tl.constexpr, TILE_M: tl.constexpr, TILE_R: tl.constexpr,
                TILE_K: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Several rows, one adapter, columns [k0, k_end), one part of the rank rows: h[m, r] = Σ x[m, k] A[r, k]."""
    m, r, k = tl.arange(0, TILE_M), tl.arange(0, TILE_R), tl.arange(0, TILE_K)
    for r0 in range(part * TILE_R, rank, parts * TILE_R):
        total = tl.zeros([TILE_M, TILE_R], tl.float32)
        for k1 in range(k0, k_end, TILE_K):
            col = k1 + k
            a = load_block(weights, addresses, start, r0 + r, rank, col, width, cut, UNCUT, ALIGN)
            wait_for_inputs(PDL)
            xs = tl.load(x + m[:, None] * x_stride + col[None, :], mask=(m < rows)[:, None] & (col < width)[None, :],
                         other=0.0)  # fmt: skip
            total = tl.dot(xs, tl.trans(a), total, input_precision="ieee")
        at = h + m[:, None] * h_stride + (r0 + r)[None, :]
        tl.store(at, total, mask=(m < rows)[:, None] & (r0 + r < rank)[None, :])


@triton.jit(do_not_specialize=["site"])
def shrink_kernel(x, site, h, weights, addresses, records, tiles, entries, sites, width, cut, h_split,
                  RECORD: tl.constexpr, UNCUT: tl.constexpr, ALIGN: tl.constexpr, VECTOR: tl.constexpr,
                  BLOCK_K: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, TILE_R: tl.constexpr,
                  PARTS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """x: [rows, width]; h: fp32 [splits, h_split]. Grid (tiles, splits, parts): a split is BLOCK_K columns, and
    `parts` programs share the rank rows of a tile. PARTS: the same number, where single rows are read by panels."""
    if PDL:
        gdc_launch_dependents()
    tile = tiles + tl.program_id(0) * _TILE_WORDS
    row, h_start, h_stride, rows, count, further, part, parts = load_tile(tile)
    split = tl.program_id(1)
    k0 = split * BLOCK_K
    x += row * width
    h += split.to(tl.int64) * h_split + h_start
    if VECTOR and rows * count == 1:
        slot, _ = load_entry(tile, entries, further, 0)
        record = records + (slot * sites + site) * RECORD
        shrink_row(x, h, tl.program_id(2), weights, addresses, tl.load(record), tl.load(record + 1), k0, width,
                   cut, UNCUT, ALIGN, BLOCK_K, PARTS, PDL)  # fmt: skip
    else:
        part, parts = part * tl.num_programs(2) + tl.program_id(2), parts * tl.num_programs(2)
        for e in range(count):
            slot, _ = load_entry(tile, entries, further, e)
            record = records + (slot * sites + site) * RECORD
            start, rank = tl.load(record), tl.multiple_of(tl.load(record + 1), _GRANULE)
            shrink_rows(x, width, rows, h, h_stride, part, parts, weights, addresses, start, rank, k0, k0 + BLOCK_K,
                        width, cut, UNCUT, ALIGN, TILE_M, TILE_R, TILE_K, PDL)  # fmt: skip
            h += rank
        wait_for_inputs(PDL)


@triton.jit
def load_h(h, h_split, splits, p, panels, BLOCK_S: tl.constexpr):
    """The 8 columns of h that belong to panel p, of every split: [splits, 8]."""
    s, r = tl.arange(0, BLOCK_S), tl.arange(0, _GRANULE)
    mask = (s < splits)[:, None] & (r < (panels - p) * _GRANULE)[None, :]
    return tl.load(h + s[:, None] * h_split + (r + p * _GRANULE)[None, :], mask=mask, other=0.0)


@triton.jit
def expand_row(y, h, h_split, splits, weight, weights, addresses, start, rank, scale_shift, n0, width, cut,
               UNCUT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
               PDL: tl.constexpr):  # fmt: skip
    """One row, one adapter, BLOCK_N columns: y[n] += w Σ h[r] B[r, n]. Two panels are in flight."""
    panels, col = rank // _GRANULE, n0 + tl.arange(0, BLOCK_N)
    at0 = panel_address(addresses, start, 0, panels, UNCUT, ALIGN)
    at1 = panel_address(addresses, start, 1, panels, UNCUT, ALIGN)
    at2 = panel_address(addresses, start, 2, panels, UNCUT, ALIGN)
    now = load_panel(weights, addresses, at0, start, 0, panels, col, width, cut, UNCUT, ALIGN)
    next = load_panel(weights, addresses, at1, start, 1, panels, col, width, cut, UNCUT, ALIGN)
    wait_for_inputs(PDL)
    if rank + scale_shift > 0:
        before = tl.load(y + col, mask=col < width, other=0.0)
        h_now = load_h(h, h_split, splits, 0, panels, BLOCK_S)
        h_next = load_h(h, h_split, splits, 1, panels, BLOCK_S)
        total = tl.zeros([BLOCK_N], tl.float32)
        for p in range(panels):
            total += tl.sum(now.to(tl.float32) * (tl.sum(h_now, 0) * weight)[:, None], 0)
            now, h_now = next, h_next
            next = load_panel(weights, addresses, at2, start, p + 2, panels, col, width, cut, UNCUT, ALIGN)
            at2 = panel_address(addresses, start, p + 3, panels, UNCUT, ALIGN)
            h_next = load_h(h, h_split, splits, p + 2, panels, BLOCK_S)
        after = before.to(tl.float32) + total
        if scale_shift > 0:
            scale, shift = load_scale_shift(weights, addresses, start, rank, col, width, cut, UNCUT)
            after = scale * after + shift
        tl.store(y + col, after.to(before.dtype), mask=col < width)


@triton.jit
def sum_h(h, h_stride, h_split, splits, r, rank, rows, TILE_M: tl.constexpr, TILE_R: tl.constexpr):
    """Columns r of a tile's intermediate, summed over the splits in order: [rows, r]; zero from `rank` on."""
    AHEAD: tl.constexpr = 16 if TILE_M * TILE_R <= 256 else 4 if TILE_M * TILE_R <= 1024 else 2
    m = tl.arange(0, TILE_M)
    at = h + m[:, None] * h_stride + r[None, :]
    mask = (m < rows)[:, None] & (r < rank)[None, :]
    total = tl.zeros([TILE_M, TILE_R], tl.float32)
    for s in range(0, splits, AHEAD):  # several at once, masked: a plain loop would wait for each
        for i in tl.static_range(AHEAD):
            total += tl.load(at + i * h_split, mask=mask & (m < (splits - s - i) * TILE_M)[:, None], other=0.0)
        at += AHEAD * h_split
    return total


@triton.jit
def first_h(h, h_stride, h_split, splits, weight, rank, rows, KIND: tl.constexpr, TILE_M: tl.constexpr,
            TILE_R: tl.constexpr):  # fmt: skip
    """The first and the second TILE_R columns of h, summed over the splits, weighted and rounded: what `tile_after`
    needs for every column of y."""
    r = tl.arange(0, TILE_R)
    first = (sum_h(h, h_stride, h_split, splits, r, rank, rows, TILE_M, TILE_R) * weight).to(KIND)
    second = tl.zeros([TILE_M, TILE_R], KIND)
    if rank > TILE_R:
        second = (sum_h(h, h_stride, h_split, splits, TILE_R + r, rank, rows, TILE_M, TILE_R) * weight).to(KIND)
    return first, second


@triton.jit
def tile_after(before, hs, hs_next, b, weight, rows, h, h_stride, h_split, splits, weights, addresses, start, rank,
               scale_shift, col, width, cut, UNCUT: tl.constexpr, ALIGN: tl.constexpr, TILE_M: tl.constexpr,
               TILE_R: tl.constexpr):  # fmt: skip
    """`before` [rows, col] plus one adapter. hs, hs_next: see `first_h`; b: the first TILE_R rows of B. The rest of h
    is summed here, again for each block of columns, since it would not fit into registers."""
    r = tl.arange(0, TILE_R)
    total = tl.dot(hs, b, input_precision="ieee")
    if rank > TILE_R:
        b = load_block(weights, addresses, start, TILE_R + r, rank, col, width, cut, UNCUT, ALIGN)
        total = tl.dot(hs_next, b, total, input_precision="ieee")
    for r0 in range(2 * TILE_R, rank, TILE_R):
        more = sum_h(h, h_stride, h_split, splits, r0 + r, rank, rows, TILE_M, TILE_R) * weight
        b = load_block(weights, addresses, start, r0 + r, rank, col, width, cut, UNCUT, ALIGN)
        total = tl.dot(more.to(b.dtype), b, total, input_precision="ieee")
    after = before.to(tl.float32) + total
    if scale_shift > 0:
        scale, shift = load_scale_shift(weights, addresses, start, rank, col, width, cut, UNCUT)
        after = scale[None, :] * after + shift[None, :]
    return after.to(before.dtype)


@triton.jit
def expand_tile(y, y_stride, rows, h, h_stride, h_split, splits, weights, addresses, records, tile, entries, further,
                site, sites, index, n0, n_end, n_step, width, cut, RECORD: tl.constexpr, UNCUT: tl.constexpr,
                ALIGN: tl.constexpr, TILE_M: tl.constexpr, TILE_R: tl.constexpr, TILE_N: tl.constexpr):  # fmt: skip
    """expand_rows() for one adapter and, of columns [n0, n_end), TILE_N at every n_step: the first columns of h are
    summed only once."""
    m, r = tl.arange(0, TILE_M), tl.arange(0, TILE_R)
    kind: tl.constexpr = weights.dtype.element_ty
    slot, weight = load_entry(tile, entries, further, 0)
    _, first, rank, scale_shift, start = load_slice(records + (slot * sites + site) * RECORD, index)
    h += first
    if rank + scale_shift > 0:
        hs, hs_next = first_h(h, h_stride, h_split, splits, weight, rank, rows, kind, TILE_M, TILE_R)
        for n in range(n0, n_end, n_step):
            col = n + tl.arange(0, TILE_N)
            to = y + m[:, None] * y_stride + col[None, :]
            inside = (m < rows)[:, None] & (col < width)[None, :]
            before = tl.load(to, mask=inside, other=0.0)
            b = load_block(weights, addresses, start, r, rank, col, width, cut, UNCUT, ALIGN)
            after = tile_after(before, hs, hs_next, b, weight, rows, h, h_stride, h_split, splits, weights, addresses,
                               start, rank, scale_shift, col, width, cut, UNCUT, ALIGN, TILE_M, TILE_R)  # fmt: skip
            tl.store(to, after, mask=inside)


@triton.jit
def rows_sum(rows, h, h_stride, h_split, splits, weights, addresses, records, tile, entries, further, count, site,
             sites, index, col, width, cut, RECORD: tl.constexpr, UNCUT: tl.constexpr, ALIGN: tl.constexpr,
             TILE_M: tl.constexpr, TILE_R: tl.constexpr, TILE_N: tl.constexpr):  # fmt: skip
    """Σ w Σ h[m, r] B[r, col] over every adapter, fp32, with h rounded to B's type; and a number that is positive if
    any of them touches the slice."""
    r = tl.arange(0, TILE_R)
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    touched = 0
    for e in range(count):
        slot, weight = load_entry(tile, entries, further, e)
        stacked, first, rank, scale_shift, start = load_slice(records + (slot * sites + site) * RECORD, index)
        for r0 in range(0, rank, TILE_R):
            hs = sum_h(h + first, h_stride, h_split, splits, r0 + r, rank, rows, TILE_M, TILE_R) * weight
            b = load_block(weights, addresses, start, r0 + r, rank, col, width, cut, UNCUT, ALIGN)
            total = tl.dot(hs.to(b.dtype), b, total, input_precision="ieee")
        h += stacked
        touched += rank + scale_shift
    return total, touched


@triton.jit
def expand_rows(y, y_stride, rows, h, h_stride, h_split, splits, weights, addresses, records, tile, entries, further,
                count, site, sites, index, n, width, cut, RECORD: tl.constexpr, UNCUT: tl.constexpr,
                ALIGN: tl.constexpr, TILE_M: tl.constexpr, TILE_R: tl.constexpr, TILE_N: tl.constexpr):  # fmt: skip
    """Several rows, every adapter, TILE_N columns: y[m, n] += Σ w Σ h[m, r] B[r, n]."""
    m, col = tl.arange(0, TILE_M), n + tl.arange(0, TILE_N)
    to = y + m[:, None] * y_stride + col[None, :]
    inside = (m < rows)[:, None] & (col < width)[None, :]
    before = tl.load(to, mask=inside, other=0.0)
    total, touched = rows_sum(rows, h, h_stride, h_split, splits, weights, addresses, records, tile, entries, further,
                              count, site, sites, index, col, width, cut, RECORD, UNCUT, ALIGN, TILE_M, TILE_R,
                              TILE_N)  # fmt: skip
    if touched > 0:
        after = before.to(tl.float32) + total
        if count == 1:
            slot, _ = load_entry(tile, entries, further, 0)
            _, _, rank, scale_shift, start = load_slice(records + (slot * sites + site) * RECORD, index)
            if scale_shift > 0:
                scale, shift = load_scale_shift(weights, addresses, start, rank, col, width, cut, UNCUT)
                after = scale[None, :] * after + shift[None, :]
        tl.store(to, after.to(before.dtype), mask=inside)


@triton.jit(do_not_specialize=["site", "splits"])
def expand_kernel(y, site, h, weights, addresses, records, tiles, entries, blocks, sites, y_stride, h_split, splits,
                  RECORD: tl.constexpr, UNCUT: tl.constexpr, ALIGN: tl.constexpr, ALIGN_N: tl.constexpr,
                  VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
                  TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y: [rows, y_stride]; blocks: int32 [blocks, 8]: slice, first column, width, offset in y, cut; BLOCK_N columns
    of one slice each. Grid (tiles, blocks)."""
    if PDL:
        gdc_launch_dependents()
    tile = tiles + tl.program_id(0) * _TILE_WORDS
    row, h_start, h_stride, rows, count, further, part, parts = load_tile(tile)
    block = blocks + tl.program_id(1) * _BLOCK_WORDS
    index, cut = tl.load(block), tl.load(block + 4)
    n0 = tl.multiple_of(tl.load(block + 1), BLOCK_N)
    width = tl.multiple_of(tl.load(block + 2), ALIGN_N)
    y += row * y_stride + tl.multiple_of(tl.load(block + 3), ALIGN_N)
    h += h_start
    if VECTOR and rows * count == 1:
        slot, weight = load_entry(tile, entries, further, 0)
        _, first, rank, scale_shift, start = load_slice(records + (slot * sites + site) * RECORD, index)
        expand_row(y, h + first, h_split, splits, weight, weights, addresses, start, rank, scale_shift, n0,
                   width, cut, UNCUT, ALIGN, BLOCK_S, BLOCK_N, PDL)  # fmt: skip
    else:
        n1 = n0 + part * TILE_N
        if PDL and UNCUT and count > 0:
            slot, _ = load_entry(tile, entries, further, 0)
            _, _, rank, _, start = load_slice(records + (slot * sites + site) * RECORD, index)
            prefetch_rows(weights, addresses, start, rank, n1, width, TILE_N)
        wait_for_inputs(PDL)
        if (not PDL) and count == 1:
            expand_tile(y, y_stride, rows, h, h_stride, h_split, splits, weights, addresses, records, tile, entries,
                        further, site, sites, index, n1, tl.minimum(n0 + BLOCK_N, width), parts * TILE_N, width, cut,
                        RECORD, UNCUT, ALIGN, TILE_M, TILE_R, TILE_N)  # fmt: skip
        elif count > 0:
            for n in range(n1, tl.minimum(n0 + BLOCK_N, width), parts * TILE_N):
                expand_rows(y, y_stride, rows, h, h_stride, h_split, splits, weights, addresses, records, tile,
                            entries, further, count, site, sites, index, n, width, cut, RECORD, UNCUT, ALIGN,
                            TILE_M, TILE_R, TILE_N)  # fmt: skip
