"""Which adapters are resident, and where their matrices are: places in, views of the arena out.

A place is a small integer that lives as long as the adapter is resident. `adapters/residency.py` installs and
removes; the backends read. The `torch` backend uses the views made here; tables on the device for kernels are kept
by a `TableListener` (`device_table.py`).
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from multilora.lora.panels import RANK_GRANULE, PanelLayout


@dataclass(frozen=True)
class Piece:
    """Rows [row, row + r) x columns [col, col + c) of a matrix, contiguous in the arena: `weight` [r, c]."""

    row: int
    col: int
    weight: torch.Tensor


@dataclass(frozen=True)
class SliceWeights:
    """B of one slice: rows [first, first + rank) of the site's stacked intermediate; lies in `pieces`."""

    offset: int  # first output column of the slice
    first: int
    rank: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class SiteWeights:
    """One adapter at one site. a: pieces of the stacked A [rank, in]."""

    rank: int
    a: tuple[Piece, ...]
    b: tuple[SliceWeights, ...]


class TableListener(Protocol):
    """Told of every adapter that comes or goes, on the thread that steps the engine, between two steps."""

    def installed(self, place: int, layout: PanelLayout, pages: list[int]) -> None: ...

    def removed(self, place: int) -> None: ...


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
        self._listeners: list[TableListener] = []

    def subscribe(self, listener: TableListener) -> None:
        """To be told of every place: those installed by now at once, the others as they come."""
        self._listeners.append(listener)
        for place, (layout, pages) in self._placed.items():
            listener.installed(place, layout, pages)

    def install(self, place: int, layout: PanelLayout, pages: list[int]) -> None:
        """The adapter's page i is now arena page pages[i]."""
        assert place not in self._placed
        self._placed[place] = (layout, list(pages))
        for listener in self._listeners:
            listener.installed(place, layout, pages)

    def remove(self, place: int) -> None:
        del self._placed[place]
        self._views.pop(place, None)
        for listener in self._listeners:
            listener.removed(place)

    def placed(self, place: int) -> tuple[PanelLayout, list[int]]:
        """What was installed there."""
        return self._placed[place]

    def site(self, place: int, site: int) -> SiteWeights | None:
        """None: the adapter does not touch this site. A place that is not installed is our bug (KeyError)."""
        if place not in self._views:
            self._views[place] = self._make_views(*self._placed[place])
        return self._views[place].get(site)

    def __len__(self) -> int:
        return len(self._placed)

    def _make_views(self, layout: PanelLayout, pages: list[int]) -> dict[int, SiteWeights]:
        sites: dict[int, SiteWeights] = {}
        for matrix, chunks in zip(layout.matrices, layout.chunks, strict=True):
            pieces = self._pieces(matrix.width, chunks, pages)
            if matrix.slice < 0:
                sites[matrix.site] = SiteWeights(matrix.rank, pieces, ())
            else:
                site = sites[matrix.site]
                first = sum(s.rank for s in site.b)
                offset = self._slice_offsets[matrix.site][matrix.slice]
                part = SliceWeights(offset, first, matrix.rank, pieces)
                sites[matrix.site] = SiteWeights(site.rank, site.a, (*site.b, part))
        return sites

    def _pieces(self, width: int, chunks: tuple, pages: list[int]) -> tuple[Piece, ...]:
        """Chunks that follow each other in one page become one piece, so that a matmul serves them together."""
        runs: list[list] = []  # [row, col, rows, columns, element address]
        for chunk in chunks:
            address = pages[chunk.page] * self.page_elements + chunk.offset // self.weights.itemsize
            last = runs[-1] if runs else None
            whole = chunk.columns == width
            if last and whole and last[3] == width and address == last[4] + last[2] * width:
                last[2] += RANK_GRANULE
            else:
                runs.append([chunk.row, chunk.col, RANK_GRANULE, chunk.columns, address])
        return tuple(
            Piece(row, col, self.weights[at : at + rows * cols].view(rows, cols)) for row, col, rows, cols, at in runs
        )
