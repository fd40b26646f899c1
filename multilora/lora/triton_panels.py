"""How the LoRA kernels read: tiles of the step, records of an adapter, panels of weights.

The tables are drawn in `triton_steps.py` (tiles, entries) and `device_table.py` (records, addresses), the panels in
`panels.py`. No kernels here; used by `triton_kernels.py` and `triton_gated.py`.
"""

import triton
import triton.language as tl

TILE_WORDS = 8  # row, entries << 16 | rows, h_start, h_stride, further, place, weight (fp32 bits), parts << 16 | part
ENTRY_WORDS = 2  # place, weight (fp32 bits)

_ENTRY_WORDS = tl.constexpr(ENTRY_WORDS)
_GRANULE = tl.constexpr(8)
_LINE = tl.constexpr(64)  # columns of a cache line, 2 bytes each


@triton.jit
def load_tile(tile):
    """Everything but its first adapter. Ranks are multiples of 8, and so is h_stride."""
    rows, parts = tl.load(tile + 1), tl.load(tile + 7)
    h_start, h_stride = tl.multiple_of(tl.load(tile + 2), _GRANULE), tl.multiple_of(tl.load(tile + 3), _GRANULE)
    return (tl.load(tile).to(tl.int64), h_start, h_stride, rows & 0xFFFF, rows >> 16, tl.load(tile + 4),
            parts & 0xFFFF, parts >> 16)  # fmt: skip


@triton.jit
def load_entry(tile, entries, further, e):
    """Place and weight of a tile's e-th adapter. The first lies in the tile itself: one read less on the way."""
    at = tile + 5
    if e > 0:
        at = entries + (further + e - 1) * _ENTRY_WORDS
    return tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.float32, bitcast=True)


@triton.jit
def load_slice(record, index):
    """Of one adapter and slice: stacked rank of the site, first column of the slice in h, rank, 1 if there is an
    scale-shift pair, start of B."""
    word = tl.load(record + 2 + 2 * index)
    stacked, first = tl.multiple_of(tl.load(record + 1), _GRANULE), tl.multiple_of(word >> 16, _GRANULE)
    return stacked, first, tl.multiple_of(word & 0x7FFF, _GRANULE), (word >> 15) & 1, tl.load(record + 3 + 2 * index)


@triton.jit
def load_scale_shift(weights, addresses, start, rank, col, width, cut, WHOLE: tl.constexpr):
    """Scales and shifts of columns `col`, fp32. They lie behind the `rank` rows of B that begin at addresses[start],
    cut as those are: of each cut the scales, then the shifts."""
    mask = col < width
    if WHOLE:
        at = tl.load(addresses + start + rank // _GRANULE)
        columns, i = width, col
    else:
        parts, c = (width + cut - 1) // cut, col // cut
        at = tl.load(addresses + start + rank // _GRANULE * parts + c, mask=mask, other=0)
        columns, i = tl.minimum(cut, width - c * cut), col % cut
    pair = (weights + at).to(tl.pointer_type(tl.float32), bitcast=True)
    return tl.load(pair + i, mask=mask, other=0.0), tl.load(pair + columns + i, mask=mask, other=0.0)


@triton.jit
def prefetch_rows(weights, addresses, start, rank, col0, width, COLUMNS: tl.constexpr):
    """Ask for COLUMNS columns of `rank` rank rows (whole panels): nothing waits, but they are on their way to the L2
    cache."""
    line = col0 + tl.arange(0, COLUMNS // _LINE) * _LINE
    r = tl.arange(0, _GRANULE)
    for row in range(0, rank, _GRANULE):
        at = tl.load(addresses + start + row // _GRANULE)
        lines = weights + at + (r * width)[:, None] + tl.minimum(line, width - 1)[None, :]
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)],
                                  dtype=tl.int32, is_pure=False, pack=1)  # fmt: skip


@triton.jit
def load_block(weights, addresses, start, r, rank, col, width, cut, WHOLE: tl.constexpr, ALIGN: tl.constexpr):
    """[r, col] of the matrix whose panels begin at addresses[start]; zero from `rank` and from `width` on.

    WHOLE: a panel is one cut; otherwise parts of `cut` columns, the last one shorter.
    """
    inside = r < rank
    mask = inside[:, None] & (col < width)[None, :]
    if WHOLE:
        at = tl.load(addresses + start + r // _GRANULE, mask=inside, other=0)
        at = tl.multiple_of(at, ALIGN)
        offset = (at + (r % _GRANULE) * width)[:, None] + col[None, :]
    else:
        parts = (width + cut - 1) // cut
        c = col // cut
        at = tl.load(addresses + start + (r // _GRANULE)[:, None] * parts + c[None, :], mask=mask, other=0)
        columns = tl.minimum(cut, width - c * cut)
        offset = at + (r % _GRANULE)[:, None] * columns[None, :] + (col % cut)[None, :]
    return tl.load(weights + offset, mask=mask, other=0.0)


@triton.jit
def panel_address(addresses, start, p, panels, WHOLE: tl.constexpr, ALIGN: tl.constexpr):
    """Where panel p of `panels` begins; asked for one step before the panel is, so that nobody waits for it."""
    if WHOLE:
        at = tl.load(addresses + start + p, mask=p < panels, other=0)
        at = tl.multiple_of(at, ALIGN)
    else:  # several addresses a panel: load_panel() reads them itself
        at = 0
    return at


@triton.jit
def load_panel(weights, addresses, at, start, p, panels, col, width, cut, WHOLE: tl.constexpr, ALIGN: tl.constexpr):
    """load_block() for the 8 rank rows of panel p, which are read once: one address, and no place in L2."""
    r = tl.arange(0, _GRANULE)
    if WHOLE:
        offset = (r * width)[:, None] + col[None, :]
        mask = (col < width)[None, :] & (r < (panels - p) * _GRANULE)[:, None]
        block = tl.load(weights + at + offset, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        block = load_block(
            weights, addresses, start, r + p * _GRANULE, panels * _GRANULE, col, width, cut, WHOLE, ALIGN
        )
    return block
