"""How adapters lie in pages: the geometry shared by the packer, the tables and the kernels.

The unit is a panel: 8 rank rows of one matrix over its full width, contiguous inside one page. A matrix is either the
stacked A of a site (`[sum of its slices' ranks, in]`, so that one shrink serves q, k and v) or the B of one slice
(`[rank, out]`). Only a panel wider than a page is cut, by columns, into equal parts (tiny models); any other is one
part. Adapters in pages of the KV arena follow S-LoRA's unified paging (Sheng et al. 2023, arXiv:2311.03285).

    site qkv_proj, ranks q 16, v 8 (k absent)
      A  [24, in]   panels: q rows 0-7, q rows 8-15, v rows 0-7
      B  q [16, out_q] panels 0-7, 8-15       v [8, out_v] panel 0-7

Ranks are rounded up to the granule of 8 with zero rows; nothing is ever padded to another adapter's rank.

A slice may also have a scale-shift pair (DoRA, biases): `y = scale · y + shift`, fp32 [2, columns] per part, scale
first, cut into the same columns as a panel of B. Full weights (replaced modules, token rows) are row-major and cut by
rows.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from multilora.lora.sites import LoraSite

RANK_GRANULE = 8
COLUMN_GRANULE = 16
SCALE_SHIFT_BYTES = 8  # per column: scale and shift
ALIGN_BYTES = 16


def round_rank(rank: int) -> int:
    """The rank as it is stored: the next multiple of RANK_GRANULE."""
    return -(-rank // RANK_GRANULE) * RANK_GRANULE


@dataclass(frozen=True)
class PanelGeometry:
    """What decides how panels are cut: page size and element size in bytes, the same for every adapter of an engine.

    Raises ValueError if a page cannot hold the smallest part.
    """

    page_bytes: int
    itemsize: int

    def __post_init__(self) -> None:
        if self.page_bytes < RANK_GRANULE * COLUMN_GRANULE * self.itemsize:
            need = RANK_GRANULE * COLUMN_GRANULE * self.itemsize
            raise ValueError(f"a page of {self.page_bytes} bytes is too small for LoRA panels, which need {need}")

    def part_columns(self, width: int) -> int:
        """Columns after which a panel of `width` columns is cut; `width` itself if the panel fits a page."""
        limit = self.page_bytes // (RANK_GRANULE * self.itemsize)
        return width if width <= limit else limit // COLUMN_GRANULE * COLUMN_GRANULE

    def num_parts(self, width: int) -> int:
        """Into how many parts a panel of `width` columns is cut."""
        return -(-width // self.part_columns(width))


class ScaleShift(enum.IntFlag):
    """What the scale-shift pair of a slice is made of; NONE: the slice has no pair."""

    NONE = 0
    DORA = 1
    BIAS = 2
    LORA_BIAS = 4


Ranks = tuple[tuple[int, ...], ...]
"""Per site, the true rank of each slice (0: not targeted)."""


@dataclass(frozen=True)
class FullWeightShape:
    """A module that an adapter replaces: all rows of its weight, or (token_ids not empty) some rows of a table."""

    layer: int
    module: str
    rows: int
    cols: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class AdapterShape:
    """Everything that decides the layout of an adapter. scale_shift: a `ScaleShift` per slice; empty: all are 0.
    shared: matrices that all experts of a site have in common, as site and slice (see `Matrix`)."""

    ranks: Ranks
    scale_shift: tuple[tuple[int, ...], ...] = ()
    full_weights: tuple[FullWeightShape, ...] = ()
    shared: frozenset[tuple[int, int]] = frozenset()

    @property
    def plain(self) -> bool:
        """Whether the adapter is low rank and nothing else."""
        return not self.scale_shift and not self.full_weights


@dataclass(frozen=True)
class Matrix:
    """The stacked A of a site (slice -1), the B of a slice, or the scale-shift pair of a slice (rank 0).

    experts: of the site. copies: one for each of those, or one that all share. They lie one after the other, as if
    they were one matrix of copies · rank rows.
    """

    site: int
    slice: int
    rank: int  # rounded
    width: int
    copies: int = 1
    experts: int = 0

    @property
    def scale_shift(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class PanelPart:
    """Where some rows x [col, col + columns) of a matrix lie: `offset` bytes into the adapter's page number `page`.

    From `row` on, there are 8 rows of a matrix, both of a scale-shift pair, or as many of a full weight as fit a
    page.
    """

    row: int
    col: int
    columns: int
    page: int
    offset: int


@dataclass(frozen=True)
class PanelLayout:
    """Where everything of an adapter lies. It depends on the adapter's shape only.

    `parts[i]` are the parts of `matrices[i]`, row by row and within a row column by column; `full_weights[i]` those
    of `shape.full_weights[i]`, by rows. used_bytes: without the padding at the ends of pages.
    """

    num_pages: int
    shape: AdapterShape
    matrices: tuple[Matrix, ...]
    parts: tuple[tuple[PanelPart, ...], ...]
    full_weights: tuple[tuple[PanelPart, ...], ...]
    used_bytes: int

    @cached_property
    def sites(self) -> frozenset[int]:
        """Indices of the sites where the adapter acts in the low-rank pass."""
        return frozenset(m.site for m in self.matrices)

    @cached_property
    def acts_on_experts(self) -> bool:
        """Whether one of those is a site of experts."""
        return any(m.experts for m in self.matrices)

    @cached_property
    def positions(self) -> np.ndarray:
        """int64 [all parts, 2]: page and offset of each, matrix by matrix."""
        return np.array([(c.page, c.offset) for parts in self.parts for c in parts], np.int64).reshape(-1, 2)


def matrices_of(sites: Sequence[LoraSite], shape: AdapterShape) -> tuple[Matrix, ...]:
    """The non-empty matrices of an adapter, in site order: A, then for each slice B and the scale-shift pair."""
    found = []
    for site, slice_ranks in zip(sites, shape.ranks, strict=True):
        rounded = [round_rank(r) for r in slice_ranks]
        scale_shift = shape.scale_shift[site.index] if shape.scale_shift else (0,) * len(rounded)
        if sum(rounded):
            copies = 1 if (site.index, -1) in shape.shared else site.copies
            found.append(Matrix(site.index, -1, sum(rounded), site.in_features, copies, site.experts))
        for i, part in enumerate(site.slices):
            if rounded[i]:
                copies = 1 if (site.index, i) in shape.shared else site.copies
                found.append(Matrix(site.index, i, rounded[i], part.out_features, copies, site.experts))
            if scale_shift[i]:
                found.append(Matrix(site.index, i, 0, part.out_features))
    return tuple(found)


@lru_cache(maxsize=256)
def make_layout(sites: tuple[LoraSite, ...], shape: AdapterShape, geometry: PanelGeometry) -> PanelLayout:
    """The layout of an adapter, by first-fit-decreasing: the largest parts first, each in the first page with room.

    Raises ValueError if one row of a full weight is larger than a page.
    """
    matrices = matrices_of(sites, shape)
    cuts = [
        *(_cut_matrix(m, geometry) for m in matrices),
        *(_cut_full_weight(w, geometry) for w in shape.full_weights),
    ]
    pages = _PageFiller(geometry.page_bytes)
    parts: list[tuple[PanelPart, ...]] = [()] * len(cuts)
    for i in sorted(range(len(cuts)), key=lambda i: -cuts[i].size):
        cut = cuts[i]
        parts[i] = tuple(PanelPart(row, col, columns, *pages.add(cut.size)) for row, col, columns in cut.parts)
    split = len(matrices)
    return PanelLayout(len(pages.used), shape, matrices, tuple(parts[:split]), tuple(parts[split:]), sum(pages.used))


@dataclass(frozen=True)
class _EqualParts:
    """One matrix, cut: the (row, col, columns) of its parts, each of which takes `size` bytes."""

    size: int
    parts: list[tuple[int, int, int]]


def _cut_matrix(matrix: Matrix, geometry: PanelGeometry) -> _EqualParts:
    step = geometry.part_columns(matrix.width)
    column_bytes = SCALE_SHIFT_BYTES if matrix.scale_shift else RANK_GRANULE * geometry.itemsize
    columns = [(col, min(step, matrix.width - col)) for col in range(0, matrix.width, step)]
    rows = range(0, max(1, matrix.copies * matrix.rank), RANK_GRANULE)
    return _EqualParts(_align(step * column_bytes), [(row, col, width) for row in rows for col, width in columns])


def _cut_full_weight(shape: FullWeightShape, geometry: PanelGeometry) -> _EqualParts:
    row_bytes = shape.cols * geometry.itemsize
    step = min(shape.rows, geometry.page_bytes // row_bytes)
    if step == 0:
        raise ValueError(f"{shape.module}: a row of {row_bytes} bytes is larger than a page")
    return _EqualParts(_align(step * row_bytes), [(row, 0, shape.cols) for row in range(0, shape.rows, step)])


def _align(size: int) -> int:
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


class _PageFiller:
    """Fills pages from their beginnings. Sizes come in descending order, so within one size a page that was too full
    once is not looked at again."""

    def __init__(self, page_bytes: int):
        self.used: list[int] = []  # per page: bytes [0, used) are taken
        self._page_bytes = page_bytes
        self._first = 0  # no page before this one has room for the current size
        self._size = 0

    def add(self, size: int) -> tuple[int, int]:
        """Page and offset of the next part, of `size` bytes."""
        if size != self._size:
            self._first, self._size = 0, size
        while self._first < len(self.used) and self.used[self._first] + size > self._page_bytes:
            self._first += 1
        if self._first == len(self.used):
            self.used.append(0)
        offset = self.used[self._first]
        self.used[self._first] += size
        return self._first, offset
