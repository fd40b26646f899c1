"""The LoRA kernels: shrink, h = x Aᵀ of every adapter of a row, and expand, y += w · h B.

Owns the arithmetic only; `triton_backend.py` launches. The tables are drawn in `device_table.py` (records, addresses)
and `triton_steps.py` (tiles). Two launches a site serve all its slices and every adapter of the batch:

    shrink   program (tile, split)     x [rows, a share of the columns] · A [stacked rank, the same columns]
                                       -> h[split], fp32: the partial sums of one split
    expand   program (tile, block)     h summed over the splits, always in the same order; B [rank, block of columns]
                                       -> y [rows, block], added once

    h of a tile: [column, row of the tile], contiguous; the stacked ranks of its adapters follow each other
        tile of 3 rows, composed of q:8 v:8 and q:8   ->   columns  q q q q q q q q v v v v v v v v q q q q q q q q

A tile is some rows of one segment. One row of one adapter takes the vector functions if VECTOR: products and sums in
fp32, the weights read once, the next panels under way while one is summed. Everything else takes `tl.dot`; such a
tile may be listed several times, as the parts that share its rank rows (shrink) and its columns (expand).
Ranks are loop bounds read from the records; grids depend on nothing but the number of rows and the model's widths.
No atomics: whatever a program writes, no other program does.

With PDL (CUDA, compute capability 9) a kernel may start while the one before it still runs: each reads tables and
weights, which that one does not write, and waits before it touches x, h or y. Every program waits, also an idle one,
so that a finished kernel means that all before it have finished.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

TILE_WORDS = 8  # row, rows, h_start, entries, first further entry, place, weight (fp32 bits), parts << 16 | part
ENTRY_WORDS = 2  # place, weight (fp32 bits)
BLOCK_WORDS = 8  # slice, first column, width, offset in y, chunk, -

_TILE_WORDS = tl.constexpr(TILE_WORDS)
_ENTRY_WORDS = tl.constexpr(ENTRY_WORDS)
_BLOCK_WORDS = tl.constexpr(BLOCK_WORDS)
_GRANULE = tl.constexpr(8)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


@triton.jit
def load_entry(tile, entries, further, e):
    """Place and weight of a tile's e-th adapter. The first lies in the tile itself: one read less on the way."""
    at = tile + 5
    if e > 0:
        at = entries + (further + e - 1) * _ENTRY_WORDS
    return tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.float32, bitcast=True)


@triton.jit
def load_slice(record, index):
    """Of one adapter and slice: stacked rank of the site, first column of the slice in h, rank, start of B."""
    word = tl.load(record + 2 + 2 * index)
    return tl.load(record + 1), word >> 16, word & 0xFFFF, tl.load(record + 3 + 2 * index)


@triton.jit
def load_block(weights, addresses, start, r, rank, col, width, chunk, WHOLE: tl.constexpr, ALIGN: tl.constexpr):
    """[r, col] of the matrix whose panels begin at addresses[start]; zero from `rank` and from `width` on.

    WHOLE: a panel is one chunk; otherwise chunks of `chunk` columns, the last one shorter.
    """
    inside = r < rank
    mask = inside[:, None] & (col < width)[None, :]
    if WHOLE:
        at = tl.multiple_of(tl.load(addresses + start + r // _GRANULE, mask=inside, other=0), ALIGN)
        offset = (at + (r % _GRANULE) * width)[:, None] + col[None, :]
    else:
        chunks = (width + chunk - 1) // chunk
        c = col // chunk
        at = tl.load(addresses + start + (r // _GRANULE)[:, None] * chunks + c[None, :], mask=mask, other=0)
        columns = tl.minimum(chunk, width - c * chunk)
        offset = at + (r % _GRANULE)[:, None] * columns[None, :] + (col % chunk)[None, :]
    return tl.load(weights + offset, mask=mask, other=0.0)


@triton.jit
def panel_address(addresses, start, p, panels, WHOLE: tl.constexpr, ALIGN: tl.constexpr):
    """Where panel p of `panels` begins; asked for one step before the panel is, so that nobody waits for it."""
    if WHOLE:  # noqa: SIM108
        at = tl.multiple_of(tl.load(addresses + start + p, mask=p < panels, other=0), ALIGN)
    else:  # several addresses a panel: load_panel() reads them itself
        at = 0
    return at


@triton.jit
def load_panel(weights, addresses, at, start, p, panels, col, width, chunk, WHOLE: tl.constexpr, ALIGN: tl.constexpr):
    """load_block() for the 8 rank rows of panel p, which are read once: one address, and no place in L2."""
    r = tl.arange(0, _GRANULE)
    if WHOLE:
        offset = (r * width)[:, None] + col[None, :]
        mask = (col < width)[None, :] & (r < (panels - p) * _GRANULE)[:, None]
        block = tl.load(weights + at + offset, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        block = load_block(
            weights, addresses, start, r + p * _GRANULE, panels * _GRANULE, col, width, chunk, WHOLE, ALIGN
        )
    return block


@triton.jit
def shrink_row(x, h, weights, addresses, start, rank, k, width, chunk, WHOLE: tl.constexpr, ALIGN: tl.constexpr,
               PDL: tl.constexpr):  # fmt: skip
    """One row, one adapter, columns k: h[r] = Σ x[k] A[r, k]. Two panels are under way at a time."""
    r, panels = tl.arange(0, _GRANULE), rank // _GRANULE
    at0 = panel_address(addresses, start, 0, panels, WHOLE, ALIGN)
    at1 = panel_address(addresses, start, 1, panels, WHOLE, ALIGN)
    at2 = panel_address(addresses, start, 2, panels, WHOLE, ALIGN)
    now = load_panel(weights, addresses, at0, start, 0, panels, k, width, chunk, WHOLE, ALIGN)
    next = load_panel(weights, addresses, at1, start, 1, panels, k, width, chunk, WHOLE, ALIGN)
    wait_for_previous(PDL)
    xs = tl.load(x + k, mask=k < width, other=0.0).to(tl.float32)
    for p in range(panels):
        tl.store(h + p * _GRANULE + r, tl.sum(now.to(tl.float32) * xs[None, :], 1))
        now = next
        next = load_panel(weights, addresses, at2, start, p + 2, panels, k, width, chunk, WHOLE, ALIGN)
        at2 = panel_address(addresses, start, p + 3, panels, WHOLE, ALIGN)


@triton.jit
def shrink_rows(x, x_stride, rows, h, part, parts, weights, addresses, start, rank, k0, k_end, width, chunk,
                WHOLE: tl.constexpr, ALIGN: tl.constexpr, TILE_M: tl.constexpr, TILE_R: tl.constexpr,
                TILE_K: tl.constexpr):  # fmt: skip
    """Several rows, one adapter, columns [k0, k_end), one part of the rank rows: h[r, m] = Σ x[m, k] A[r, k]."""
    m, r, k = tl.arange(0, TILE_M), tl.arange(0, TILE_R), tl.arange(0, TILE_K)
    for r0 in range(part * TILE_R, rank, parts * TILE_R):
        total = tl.zeros([TILE_M, TILE_R], tl.float32)
        for k1 in range(k0, k_end, TILE_K):
            col = k1 + k
            xs = tl.load(x + m[:, None] * x_stride + col[None, :], mask=(m < rows)[:, None] & (col < width)[None, :],
                         other=0.0)  # fmt: skip
            a = load_block(weights, addresses, start, r0 + r, rank, col, width, chunk, WHOLE, ALIGN)
            total = tl.dot(xs, tl.trans(a), total, input_precision="ieee")
        at = h + (r0 + r)[None, :] * rows + m[:, None]
        tl.store(at, total, mask=(m < rows)[:, None] & (r0 + r < rank)[None, :])


@triton.jit(do_not_specialize=["site"])
def shrink_kernel(x, h, weights, addresses, records, tiles, entries, site, sites, width, chunk, h_split,
                  RECORD: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr, VECTOR: tl.constexpr,
                  BLOCK_K: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, TILE_R: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """x: [rows, width]; h: fp32 [splits, h_split]. Grid (tiles, splits), a split is BLOCK_K columns."""
    if PDL:
        gdc_launch_dependents()
    tile = tiles + tl.program_id(0) * _TILE_WORDS
    row, rows = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    h_start, count, further = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    part, parts = tl.load(tile + 7) & 0xFFFF, tl.load(tile + 7) >> 16
    split = tl.program_id(1)
    k0 = split * BLOCK_K
    x += row * width
    h += split.to(tl.int64) * h_split + h_start
    if VECTOR and rows * count == 1:
        place, _ = load_entry(tile, entries, further, 0)
        record = records + (place * sites + site) * RECORD
        shrink_row(x, h, weights, addresses, tl.load(record), tl.load(record + 1), k0 + tl.arange(0, BLOCK_K), width,
                   chunk, WHOLE, ALIGN, PDL)  # fmt: skip
    else:
        wait_for_previous(PDL)
        for e in range(count):
            place, _ = load_entry(tile, entries, further, e)
            record = records + (place * sites + site) * RECORD
            start, rank = tl.load(record), tl.load(record + 1)
            shrink_rows(x, width, rows, h, part, parts, weights, addresses, start, rank, k0, k0 + BLOCK_K, width,
                        chunk, WHOLE, ALIGN, TILE_M, TILE_R, TILE_K)  # fmt: skip
            h += rank * rows


@triton.jit
def load_h(h, h_split, splits, p, panels, BLOCK_S: tl.constexpr):
    """The 8 columns of panel p, of every split: [splits, 8]."""
    s, r = tl.arange(0, BLOCK_S), tl.arange(0, _GRANULE)
    mask = (s < splits)[:, None] & (r < (panels - p) * _GRANULE)[None, :]
    return tl.load(h + s[:, None] * h_split + (r + p * _GRANULE)[None, :], mask=mask, other=0.0)


@triton.jit
def expand_row(y, h, h_split, splits, weight, weights, addresses, start, rank, col, width, chunk, WHOLE: tl.constexpr,
               ALIGN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One row, one adapter, columns `col`: y[n] += w Σ h[r] B[r, n]. Two panels are under way at a time."""
    panels = rank // _GRANULE
    at0 = panel_address(addresses, start, 0, panels, WHOLE, ALIGN)
    at1 = panel_address(addresses, start, 1, panels, WHOLE, ALIGN)
    at2 = panel_address(addresses, start, 2, panels, WHOLE, ALIGN)
    now = load_panel(weights, addresses, at0, start, 0, panels, col, width, chunk, WHOLE, ALIGN)
    next = load_panel(weights, addresses, at1, start, 1, panels, col, width, chunk, WHOLE, ALIGN)
    wait_for_previous(PDL)
    if rank > 0:
        before = tl.load(y + col, mask=col < width, other=0.0)
        h_now = load_h(h, h_split, splits, 0, panels, BLOCK_S)
        h_next = load_h(h, h_split, splits, 1, panels, BLOCK_S)
        total = tl.zeros([BLOCK_N], tl.float32)
        for p in range(panels):
            total += tl.sum(now.to(tl.float32) * (tl.sum(h_now, 0) * weight)[:, None], 0)
            now, h_now = next, h_next
            next = load_panel(weights, addresses, at2, start, p + 2, panels, col, width, chunk, WHOLE, ALIGN)
            at2 = panel_address(addresses, start, p + 3, panels, WHOLE, ALIGN)
            h_next = load_h(h, h_split, splits, p + 2, panels, BLOCK_S)
        tl.store(y + col, (before.to(tl.float32) + total).to(before.dtype), mask=col < width)


@triton.jit
def expand_rows(y, y_stride, rows, h, h_split, splits, weights, addresses, records, tile, entries, further, count,
                site, sites, index, col, width, chunk, RECORD: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr,
                TILE_M: tl.constexpr, TILE_R: tl.constexpr, TILE_N: tl.constexpr):  # fmt: skip
    """Several rows, every adapter, columns `col`: y[m, n] += Σ w Σ h[r, m] B[r, n]; h is rounded to B's type."""
    m, r = tl.arange(0, TILE_M), tl.arange(0, TILE_R)
    AHEAD: tl.constexpr = 4 if TILE_M <= 16 else 1
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    touched = 0
    for e in range(count):
        place, weight = load_entry(tile, entries, further, e)
        stacked, first, rank, start = load_slice(records + (place * sites + site) * RECORD, index)
        for r0 in range(0, rank, TILE_R):
            at = h + (first + r0 + r)[None, :] * rows + m[:, None]
            mask = (m < rows)[:, None] & (r0 + r < rank)[None, :]
            hs = tl.zeros([TILE_M, TILE_R], tl.float32)
            for s in range(0, splits, AHEAD):  # several at once, masked: a plain loop would wait for each
                for i in tl.static_range(AHEAD):
                    hs += tl.load(at + i * h_split, mask=mask & (m < (splits - s - i) * TILE_M)[:, None], other=0.0)
                at += AHEAD * h_split
            b = load_block(weights, addresses, start, r0 + r, rank, col, width, chunk, WHOLE, ALIGN)
            total = tl.dot((hs * weight).to(b.dtype), b, total, input_precision="ieee")
        h += stacked * rows
        touched += rank
    if touched > 0:
        to = y + m[:, None] * y_stride + col[None, :]
        inside = (m < rows)[:, None] & (col < width)[None, :]
        before = tl.load(to, mask=inside, other=0.0)
        tl.store(to, (before.to(tl.float32) + total).to(before.dtype), mask=inside)


@triton.jit(do_not_specialize=["site", "splits"])
def expand_kernel(y, h, weights, addresses, records, tiles, entries, blocks, site, sites, y_stride, h_split, splits,
                  RECORD: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr, ALIGN_N: tl.constexpr,
                  VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
                  TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """y: [rows, y_stride]; blocks: int32 [blocks, 8]: slice, first column, width, offset in y, chunk; BLOCK_N columns
    of one slice each. Grid (tiles, blocks)."""
    if PDL:
        gdc_launch_dependents()
    tile = tiles + tl.program_id(0) * _TILE_WORDS
    row, rows = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    h_start, count, further = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    part, parts = tl.load(tile + 7) & 0xFFFF, tl.load(tile + 7) >> 16
    block = blocks + tl.program_id(1) * _BLOCK_WORDS
    index, chunk = tl.load(block), tl.load(block + 4)
    n0 = tl.multiple_of(tl.load(block + 1), BLOCK_N)
    width = tl.multiple_of(tl.load(block + 2), ALIGN_N)
    y += row * y_stride + tl.multiple_of(tl.load(block + 3), ALIGN_N)
    h += h_start
    if VECTOR and rows * count == 1:
        place, weight = load_entry(tile, entries, further, 0)
        _, first, rank, start = load_slice(records + (place * sites + site) * RECORD, index)
        expand_row(y, h + first, h_split, splits, weight, weights, addresses, start, rank, n0 + tl.arange(0, BLOCK_N),
                   width, chunk, WHOLE, ALIGN, BLOCK_S, BLOCK_N, PDL)  # fmt: skip
    else:
        wait_for_previous(PDL)
        if count > 0:
            for n in range(n0 + part * TILE_N, tl.minimum(n0 + BLOCK_N, width), parts * TILE_N):
                expand_rows(y, y_stride, rows, h, h_split, splits, weights, addresses, records, tile, entries,
                            further, count, site, sites, index, n + tl.arange(0, TILE_N), width, chunk, RECORD,
                            WHOLE, ALIGN, TILE_M, TILE_R, TILE_N)  # fmt: skip
