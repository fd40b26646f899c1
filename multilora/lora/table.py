"""Which adapters are resident, and where their matrices are: slots in, views of the arena out.

A slot is a small integer that lives as long as the adapter is resident. `adapters/lifecycle/device_tier.py` installs
and removes adapters; the backends read. The `torch` backend uses the views made here; a `TableListener`
(`device_table.py`) keeps the tables on the device that kernels read.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from multilora.lora.panels import RANK_GRANULE, SCALE_SHIFT_BYTES, Matrix, PanelLayout, PanelPart


@dataclass(frozen=True)
class Piece:
    """Rows [row, row + r) x columns [col, col + c) of a matrix, contiguous in the arena: `weight` [r, c]."""

    row: int
    col: int
    weight: torch.Tensor


@dataclass(frozen=True)
class SliceWeights:
    """B of one slice, which multiplies columns [first, first + rank) of the site's stacked intermediate.

    scale_shift: pieces of the pair of scale and shift, fp32 [2, columns]; empty: the slice has none.
    """

    offset: int  # first output column of the slice
    width: int
    first: int
    rank: int
    pieces: tuple[Piece, ...]
    scale_shift: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class SiteWeights:
    """One adapter at one site. a: pieces of the stacked A [rank, in], none if rank is 0; b: its slices' B."""

    rank: int
    a: tuple[Piece, ...]
    b: tuple[SliceWeights, ...]


@dataclass(frozen=True)
class FullWeight:
    """The weight [rows, cols] of a module that an adapter replaces, or (token_ids not None) some rows of a table."""

    rows: int
    cols: int
    pieces: tuple[Piece, ...]
    token_ids: torch.Tensor | None  # int64 [rows], ascending


class TableWriter(Protocol):
    """Where residency says which adapters come and go: a `LoraTable`, or what tells one later."""

    def install(self, slot: int, layout: PanelLayout, pages: list[int]) -> None: ...

    def remove(self, slot: int) -> None: ...


class TableListener(Protocol):
    """Hears of every adapter that is installed or removed, on the thread that steps the engine, between two steps."""

    def installed(self, slot: int, layout: PanelLayout, pages: list[int]) -> None:
        """`slot` holds an adapter of this layout now, whose page i is arena page pages[i]."""

    def removed(self, slot: int) -> None:
        """`slot` is empty now."""


Placed = tuple[Matrix, tuple[PanelPart, ...]]
"""A matrix, and where it lies."""


def _of_copy(matrix: Matrix, parts: tuple[PanelPart, ...], copy: int) -> tuple[PanelPart, ...]:
    """The parts of one of the matrix' copies, as if there were no other."""
    if matrix.copies == 1:
        return parts
    count = len(parts) // matrix.copies
    own = parts[copy * count : (copy + 1) * count]
    return tuple(replace(part, row=part.row - copy * matrix.rank) for part in own)


class LoraTable:
    """Slot → site → weights. The views of a slot are made when they are first asked for.

    arena: uint8 [num_pages, page_bytes], holding panels in `dtype`; slice_offsets: per site, each slice's first
    output column.
    """

    def __init__(self, arena: torch.Tensor, dtype: torch.dtype, slice_offsets: tuple[tuple[int, ...], ...]):
        self.weights = arena.view(-1).view(dtype)  # [num_pages x page_elements]
        self.num_pages = arena.shape[0]
        self.page_elements = arena.shape[1] // dtype.itemsize
        self._slice_offsets = slice_offsets
        self._installed: dict[int, tuple[PanelLayout, list[int]]] = {}
        self._views: dict[int, dict[int, SiteWeights]] = {}
        self._expert_views: dict[int, dict[tuple[int, int], SiteWeights]] = {}
        self._full_weights: dict[int, dict[tuple[int, str], list[FullWeight]]] = {}
        self._listeners: list[TableListener] = []

    def subscribe(self, listener: TableListener) -> None:
        """Call `listener` for every slot: at once for those installed already, later as the others come and go."""
        self._listeners.append(listener)
        for slot, (layout, pages) in self._installed.items():
            listener.installed(slot, layout, pages)

    def install(self, slot: int, layout: PanelLayout, pages: list[int]) -> None:
        """Fill an empty slot; the adapter's page i is arena page pages[i]. The pages stay the caller's."""
        assert slot not in self._installed
        self._installed[slot] = (layout, list(pages))
        for listener in self._listeners:
            listener.installed(slot, layout, pages)

    def remove(self, slot: int) -> None:
        """Empty a slot. No step that is launched later may name it."""
        del self._installed[slot]
        self._views.pop(slot, None)
        self._expert_views.pop(slot, None)
        self._full_weights.pop(slot, None)
        for listener in self._listeners:
            listener.removed(slot)

    def lookup(self, slot: int) -> tuple[PanelLayout, list[int]]:
        """Layout and arena pages of the adapter installed in `slot`."""
        return self._installed[slot]

    def site(self, slot: int, site: int, expert: int | None = None) -> SiteWeights | None:
        """The adapter's weights at a site, of one of its experts if it has some; None: it does not touch it. KeyError
        if the slot is empty."""
        if expert is not None:
            return self._expert_site(slot, site, expert)
        if slot not in self._views:
            layout, pages = self._installed[slot]
            placed = zip(layout.matrices, layout.parts, strict=True)
            self._views[slot] = self._make_views((both for both in placed if not both[0].experts), pages)
        return self._views[slot].get(site)

    def _expert_site(self, slot: int, site: int, expert: int) -> SiteWeights | None:
        views = self._expert_views.setdefault(slot, {})
        layout, pages = self._installed[slot]
        if (site, expert) not in views and site in layout.sites:
            matrices = [
                (matrix, _of_copy(matrix, parts, expert))
                for matrix, parts in zip(layout.matrices, layout.parts, strict=True)
                if matrix.site == site
            ]
            views[site, expert] = self._make_views(matrices, pages)[site]
        return views.get((site, expert))

    def acts_on_experts(self, slot: int) -> bool:
        """Whether the adapter has weights for experts of its own."""
        return self._installed[slot][0].acts_on_experts

    def full_weights(self, slot: int, layer: int, module: str) -> list[FullWeight]:
        """What the adapter replaces of a module: nothing, its weight, or some of its rows."""
        if slot not in self._full_weights:
            self._full_weights[slot] = self._make_full_weights(*self._installed[slot])
        return self._full_weights[slot].get((layer, module), [])

    def __len__(self) -> int:
        return len(self._installed)

    def _make_views(self, matrices: Iterable[Placed], pages: list[int]) -> dict[int, SiteWeights]:
        sites: dict[int, SiteWeights] = {}
        for matrix, parts in matrices:
            site = sites.get(matrix.site, SiteWeights(0, (), ()))
            if matrix.slice < 0:
                site = SiteWeights(matrix.rank, self._pieces(matrix.width, parts, pages), ())
            elif matrix.scale_shift:
                pieces = tuple(self._scale_shift(part, pages) for part in parts)
                site = self._with_scale_shift(site, matrix, pieces)
            else:
                offset = self._slice_offsets[matrix.site][matrix.slice]
                first = sum(s.rank for s in site.b)
                pieces = self._pieces(matrix.width, parts, pages)
                part = SliceWeights(offset, matrix.width, first, matrix.rank, pieces)
                site = replace(site, b=(*site.b, part))
            sites[matrix.site] = site
        return sites

    def _with_scale_shift(self, site: SiteWeights, matrix: Matrix, scale_shift: tuple[Piece, ...]) -> SiteWeights:
        """`site` with the pair in the entry of its slice, the last one if the slice has a B, else a new one."""
        offset = self._slice_offsets[matrix.site][matrix.slice]
        if site.b and site.b[-1].offset == offset:
            return replace(site, b=(*site.b[:-1], replace(site.b[-1], scale_shift=scale_shift)))
        part = SliceWeights(offset, matrix.width, sum(s.rank for s in site.b), 0, (), scale_shift)
        return replace(site, b=(*site.b, part))

    def _scale_shift(self, part: PanelPart, pages: list[int]) -> Piece:
        at = self._address(part, pages)
        size = SCALE_SHIFT_BYTES * part.columns // self.weights.itemsize
        return Piece(0, part.col, self.weights[at : at + size].view(torch.float32).view(2, part.columns))

    def _make_full_weights(self, layout: PanelLayout, pages: list[int]) -> dict[tuple[int, str], list[FullWeight]]:
        found: dict[tuple[int, str], list[FullWeight]] = {}
        for shape, parts in zip(layout.shape.full_weights, layout.full_weights, strict=True):
            ends = [*(part.row for part in parts[1:]), shape.rows]
            pieces = []
            for part, end in zip(parts, ends, strict=True):
                at, rows = self._address(part, pages), end - part.row
                weight = self.weights[at : at + rows * shape.cols].view(rows, shape.cols)
                pieces.append(Piece(part.row, 0, weight))
            ids = torch.tensor(shape.token_ids, device=self.weights.device) if shape.token_ids else None
            weights = FullWeight(shape.rows, shape.cols, tuple(pieces), ids)
            found.setdefault((shape.layer, shape.module), []).append(weights)
        return found

    def _address(self, part: PanelPart, pages: list[int]) -> int:
        return pages[part.page] * self.page_elements + part.offset // self.weights.itemsize

    def _pieces(self, width: int, parts: tuple[PanelPart, ...], pages: list[int]) -> tuple[Piece, ...]:
        """Uncut panels that follow each other in one page become one piece, so that one matmul serves them."""
        found: list[list[int]] = []  # [row, col, rows, columns, element address]
        for part in parts:
            address = self._address(part, pages)
            last = found[-1] if found else None
            entire = part.columns == width
            if last and entire and last[3] == width and address == last[4] + last[2] * width:
                last[2] += RANK_GRANULE
            else:
                found.append([part.row, part.col, RANK_GRANULE, part.columns, address])
        return tuple(
            Piece(row, col, self.weights[at : at + rows * cols].view(rows, cols))
            for row, col, rows, cols, at in found
        )
