"""How the LoRA kernels read: tiles of the step, records of an adapter, panels of weights.

The tables are drawn in `triton_steps.py` (tiles, entries) and `device_table.py` (records, addresses), the panels in
`panels.py`. These are functions of kernels, not kernels. Called by `triton_kernels.py` and `triton_gated.py`.

What their arguments mean everywhere:

    start           index in `addresses` of a matrix' first part
    width, cut      columns of the matrix, and columns after which its panels are cut into parts
    UNCUT           the two are equal: a panel is one part, and has one address
    ALIGN           elements by which every address is divisible
"""

import triton
import triton.language as tl

TILE_WORDS = 8  # row, entries << 16 | rows, h_start, h_stride, further, slot, weight (fp32 bits), parts << 16 | part
ENTRY_WORDS = 2  # slot, weight (fp32 bits)

_ENTRY_WORDS = tl.constexpr(ENTRY_WORDS)
_GRANULE = tl.constexpr(8)
_LINE = tl.constexpr(64)  # columns of a cache line, 2 bytes each


@triton.jit
def load_tile(tile):
    """All words of a tile but its first adapter: row, h_start, h_stride, rows, adapters, further, part, parts.
    Ranks are multiples of 8, and so is h_stride."""
    rows, parts = tl.load(tile + 1), tl.load(tile + 7)
    h_start, h_stride = tl.multiple_of(tl.load(tile + 2), _GRANULE), tl.multiple_of(tl.load(tile + 3), _GRANULE)
    return (tl.load(tile).to(tl.int64), h_start, h_stride, rows & 0xFFFF, rows >> 16, tl.load(tile + 4),
            parts & 0xFFFF, parts >> 16)  # fmt: skip


@triton.jit
def load_entry(tile, entries, further, e):
    """Slot and weight of a tile's e-th adapter. The first lies in the tile itself, which saves a dependent read."""
    at = tile + 5
    if e > 0:
        at = entries + (further + e - 1) * _ENTRY_WORDS
    return tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.float32, bitcast=True)


@triton.jit
def load_slice(record, index):
    """One adapter at one slice: stacked rank of the site, first column of the slice in h, rank, 1 if the slice has a
    scale-shift pair (else 0), start of B."""
    word = tl.load(record + 2 + 2 * index)
    stacked, first = tl.multiple_of(tl.load(record + 1), _GRANULE), tl.multiple_of(word >> 16, _GRANULE)
    return stacked, first, tl.multiple_of(word & 0x7FFF, _GRANULE), (word >> 15) & 1, tl.load(record + 3 + 2 * index)


@triton.jit
def load_scale_shift(weights, addresses, start, rank, col, width, cut, UNCUT: tl.constexpr):
    """Scales and shifts of columns `col`, fp32. They follow the `rank` rows of B that begin at addresses[start], and
    are cut as those are; each part holds its scales, then its shifts."""
    mask = col < width
    if UNCUT:
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
    """Prefetch COLUMNS columns of `rank` rank rows (uncut panels) into the L2 cache, without waiting for them."""
    LINES: tl.constexpr = (COLUMNS + _LINE - 1) // _LINE
    line = col0 + tl.arange(0, LINES) * _LINE
    r = tl.arange(0, _GRANULE)
    for row in range(0, rank, _GRANULE):
        at = tl.load(addresses + start + row // _GRANULE)
        lines = weights + at + (r * width)[:, None] + tl.minimum(line, width - 1)[None, :]
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)],
                                  dtype=tl.int32, is_pure=False, pack=1)  # fmt: skip


@triton.jit
def load_block(weights, addresses, start, r, rank, col, width, cut, UNCUT: tl.constexpr, ALIGN: tl.constexpr):
    """Elements [r, col] of the matrix that begins at addresses[start]; zero from `rank` and from `width` on."""
    inside = r < rank
    mask = inside[:, None] & (col < width)[None, :]
    if UNCUT:
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
def panel_address(addresses, start, p, panels, UNCUT: tl.constexpr, ALIGN: tl.constexpr):
    """Where panel p of `panels` begins. Callers load it one iteration before the panel, to hide its latency."""
    if UNCUT:
        at = tl.load(addresses + start + p, mask=p < panels, other=0)
        at = tl.multiple_of(at, ALIGN)
    else:  # several addresses a panel: load_panel() reads them itself
        at = 0
    return at


@triton.jit
def load_panel(weights, addresses, at, start, p, panels, col, width, cut, UNCUT: tl.constexpr, ALIGN: tl.constexpr):
    """load_block() for the 8 rank rows of panel p, which are read once: one address, and evicted first from L2."""
    r = tl.arange(0, _GRANULE)
    if UNCUT:
        offset = (r * width)[:, None] + col[None, :]
        mask = (col < width)[None, :] & (r < (panels - p) * _GRANULE)[:, None]
        block = tl.load(weights + at + offset, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        block = load_block(
            weights, addresses, start, r + p * _GRANULE, panels * _GRANULE, col, width, cut, UNCUT, ALIGN
        )
    return block
