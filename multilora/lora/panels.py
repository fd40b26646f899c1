"""How LoRA weights lie in pages: the geometry shared by the packer, the tables and the kernels.

The unit is a panel: 8 rank rows of one matrix over its whole width, contiguous inside one page. A matrix is either
the stacked A of a site (`[sum of its slices' ranks, in]`, so that one shrink serves q, k and v) or the B of one
slice (`[rank, out]`). Only a panel wider than a page is cut, by columns, into equal chunks (tiny models).

    site qkv_proj, ranks q 16, v 8 (k absent)
      A  [24, in]   panels: q rows 0-7, q rows 8-15, v rows 0-7
      B  q [16, out_q] panels 0-7, 8-15       v [8, out_v] panel 0-7

Ranks are rounded up to the granule of 8 with zero rows; nothing is ever padded to another adapter's rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from multilora.lora.sites import LoraSite

RANK_GRANULE = 8
COLUMN_GRANULE = 16


def round_rank(rank: int) -> int:
    return -(-rank // RANK_GRANULE) * RANK_GRANULE


@dataclass(frozen=True)
class PanelGeometry:
    """What decides how panels are cut: page size and element size, the same for every adapter of an engine."""

    page_bytes: int
    itemsize: int

    def __post_init__(self) -> None:
        if self.page_bytes < RANK_GRANULE * COLUMN_GRANULE * self.itemsize:
            need = RANK_GRANULE * COLUMN_GRANULE * self.itemsize
            raise ValueError(f"a page of {self.page_bytes} bytes is too small for LoRA panels, which need {need}")

    def chunk_columns(self, width: int) -> int:
        """Columns of one chunk of a panel `width` columns wide; `width` itself when a whole panel fits a page."""
        limit = self.page_bytes // (RANK_GRANULE * self.itemsize)
        return width if width <= limit else limit // COLUMN_GRANULE * COLUMN_GRANULE

    def chunks(self, width: int) -> int:
        return -(-width // self.chunk_columns(width))


@dataclass(frozen=True)
class Matrix:
    """One matrix of one adapter: the stacked A of a site (slice -1) or the B of one of its slices."""

    site: int
    slice: int
    rank: int  # rounded
    width: int


@dataclass(frozen=True)
class Chunk:
    """Where 8 rows x [col, col + columns) of a matrix lie: `offset` bytes into the adapter's page number `page`."""

    row: int
    col: int
    columns: int
    page: int
    offset: int


@dataclass(frozen=True)
class PanelLayout:
    """The placement of a whole adapter: a function of its ranks only.

    `chunks[i]` are the chunks of `matrices[i]`, row by row, then column by column.
    """

    num_pages: int
    matrices: tuple[Matrix, ...]
    chunks: tuple[tuple[Chunk, ...], ...]
    used_bytes: int

    @cached_property
    def places(self) -> np.ndarray:
        """int64 [all chunks, 2]: page and offset of each, matrix by matrix."""
        return np.array([(c.page, c.offset) for chunks in self.chunks for c in chunks], np.int64).reshape(-1, 2)


Ranks = tuple[tuple[int, ...], ...]
"""Per site, the true rank of each slice (0: not targeted)."""


def matrices_of(sites: Sequence[LoraSite], ranks: Ranks) -> tuple[Matrix, ...]:
    """The non-empty matrices of an adapter with these ranks, in site order, A before its Bs."""
    found = []
    for site, slice_ranks in zip(sites, ranks, strict=True):
        rounded = [round_rank(r) for r in slice_ranks]
        if sum(rounded):
            found.append(Matrix(site.index, -1, sum(rounded), site.in_features))
        for i, rank in enumerate(rounded):
            if rank:
                found.append(Matrix(site.index, i, rank, site.slices[i].out_features))
    return tuple(found)


@lru_cache(maxsize=256)
def place_panels(sites: tuple[LoraSite, ...], ranks: Ranks, geometry: PanelGeometry) -> PanelLayout:
    """First-fit-decreasing: widest panels first, each into the first page with room."""
    matrices = matrices_of(sites, ranks)
    size_of = lambda m: geometry.chunk_columns(m.width) * RANK_GRANULE * geometry.itemsize  # noqa: E731
    order = sorted(range(len(matrices)), key=lambda i: -size_of(matrices[i]))
    chunks: list[tuple[Chunk, ...]] = [()] * len(matrices)
    used: list[int] = []  # bytes taken of each page
    first = 0  # no page before this one has room for the current size or a larger one
    last_size = 0
    for i in order:
        matrix, size = matrices[i], size_of(matrices[i])
        if size != last_size:
            first, last_size = 0, size
        step = geometry.chunk_columns(matrix.width)
        placed = []
        for row in range(0, matrix.rank, RANK_GRANULE):
            for col in range(0, matrix.width, step):
                while first < len(used) and used[first] + size > geometry.page_bytes:
                    first += 1
                if first == len(used):
                    used.append(0)
                placed.append(Chunk(row, col, min(step, matrix.width - col), first, used[first]))
                used[first] += size
        chunks[i] = tuple(placed)
    return PanelLayout(len(used), matrices, tuple(chunks), sum(used))
