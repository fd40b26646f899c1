"""Which adapters are resident, and where their matrices are: places in, views of the arena out.

A place is a small integer that lives as long as the adapter is resident. `adapters/device/residency.py` installs and
removes; the backends read. The `torch` backend uses the views made here; tables on the device for kernels are kept
by a `TableListener` (`device_table.py`).
"""

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
    """B of one slice: rows [first, first + rank) of the site's stacked intermediate; lies in `pieces`.

    scale_shift: pieces of the pair of scale and shift, fp32 [2, columns]; empty: there is none.
    """

    offset: int  # first output column of the slice
    width: int
    first: int
    rank: int
    pieces: tuple[Piece, ...]
    scale_shift: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class SiteWeights:
    """One adapter at one site. a: pieces of the stacked A [rank, in]; none of them if rank is 0."""

    rank: int
    a: tuple[Piece, ...]
    b: tuple[SliceWeights, ...]


@dataclass(frozen=True)
class FullWeight:
    """A module that an adapter replaces, or (token_ids not None) some rows of a table. pieces: by rows."""

    rows: int
    cols: int
    pieces: tuple[Piece, ...]
    token_ids: torch.Tensor | None  # int64 [rows], ascending


class TableListener(Protocol):
    """Told of every adapter that comes or goes, on the thread that steps the engine, between two steps."""

    def installed(self, slot: int, layout: PanelLayout, pages: list[int]) -> None: ...

    def removed(self, slot: int) -> None: ...


class LoraTable:
    """Place → site → weights. The views of a place are made when first asked for.

    arena: uint8 [num_pages, page_bytes], holding panels in `dtype`; slice_offsets: per site, each slice's first
    output column.
    """

    def __init__(self, arena: torch.Tensor, dtype: torch.dtype, slice_offsets: tuple[tuple[int, ...], ...]):
        self.weights = arena.view(-1).view(dtype)  # [num_pages x page_elements]
        self.num_pages = arena.shape[0]
        self.page_elements = arena.shape[1] // dtype.itemsize
        self._slice_offsets = slice_offsets
        self._placed: dict[int, tuple[PanelLayout, list[int]]] = {}
        self._views: dict[int, dict[int, SiteWeights]] = {}
        self._full_weights: dict[int, dict[tuple[int, str], list[FullWeight]]] = {}
        self._listeners: list[TableListener] = []

    def subscribe(self, listener: TableListener) -> None:
        """Have `listener` told of every slot: those installed by now at once, the others as they come."""
        self._listeners.append(listener)
        for slot, (layout, pages) in self._placed.items():
            listener.installed(slot, layout, pages)

    def install(self, slot: int, layout: PanelLayout, pages: list[int]) -> None:
        """The adapter's page i is now arena page pages[i]."""
        assert slot not in self._placed
        self._placed[slot] = (layout, list(pages))
        for listener in self._listeners:
            listener.installed(slot, layout, pages)

    def remove(self, slot: int) -> None:
        del self._placed[slot]
        self._views.pop(slot, None)
        self._full_weights.pop(slot, None)
        for listener in self._listeners:
            listener.removed(slot)

    def lookup(self, slot: int) -> tuple[PanelLayout, list[int]]:
        """What was installed there."""
        return self._placed[slot]

    def site(self, slot: int, site: int) -> SiteWeights | None:
        """None: the adapter does not touch this site. A slot with nothing installed is our bug (KeyError)."""
        if slot not in self._views:
            self._views[slot] = self._make_views(*self._placed[slot])
        return self._views[slot].get(site)

    def full_weights(self, slot: int, layer: int, module: str) -> list[FullWeight]:
        """What the adapter puts in place of a module: nothing, its weight, or rows of it."""
        if slot not in self._full_weights:
            self._full_weights[slot] = self._make_full_weights(*self._placed[slot])
        return self._full_weights[slot].get((layer, module), [])

    def __len__(self) -> int:
        return len(self._placed)

    def _make_views(self, layout: PanelLayout, pages: list[int]) -> dict[int, SiteWeights]:
        sites: dict[int, SiteWeights] = {}
        for matrix, parts in zip(layout.matrices, layout.parts, strict=True):
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
        """The pair follows the B of its slice, if that has one."""
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
        """Chunks that follow each other in one page become one piece, so that a matmul serves them together."""
        runs: list[list[int]] = []  # [row, col, rows, columns, element address]
        for part in parts:
            address = self._address(part, pages)
            last = runs[-1] if runs else None
            entire = part.columns == width
            if last and entire and last[3] == width and address == last[4] + last[2] * width:
                last[2] += RANK_GRANULE
            else:
                runs.append([part.row, part.col, RANK_GRANULE, part.columns, address])
        return tuple(
            Piece(row, col, self.weights[at : at + rows * cols].view(rows, cols)) for row, col, rows, cols, at in runs
        )
