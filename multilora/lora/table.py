"""Which adapters are resident, and where their matrices are: places in, views of the arena out.

A place is a small integer that lives as long as the adapter is resident. `adapters/residency.py` installs and
removes; the backends read. The `torch` backend uses the views made here; device tables for kernels are theirs.
"""

from dataclasses import dataclass

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


class LoraTable:
    """Place → site → weights.

    arena: uint8 [num_pages, page_bytes], holding panels in `dtype`; slice_offsets: per site, each slice's first
    output column.
    """

    def __init__(self, arena: torch.Tensor, dtype: torch.dtype, slice_offsets: tuple[tuple[int, ...], ...]):
        self._flat = arena.view(-1).view(dtype)
        self._page_elements = arena.shape[1] // dtype.itemsize
        self._itemsize = dtype.itemsize
        self._slice_offsets = slice_offsets
        self._places: dict[int, dict[int, SiteWeights]] = {}

    def install(self, place: int, layout: PanelLayout, pages: list[int]) -> None:
        """The adapter's page i is now arena page pages[i]."""
        assert place not in self._places
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
        self._places[place] = sites

    def remove(self, place: int) -> None:
        del self._places[place]

    def site(self, place: int, site: int) -> SiteWeights | None:
        """None: the adapter does not touch this site. A place that is not installed is our bug (KeyError)."""
        return self._places[place].get(site)

    def __len__(self) -> int:
        return len(self._places)

    def _pieces(self, width: int, chunks: tuple, pages: list[int]) -> tuple[Piece, ...]:
        """Chunks that follow each other in one page become one piece, so that a matmul serves them together."""
        runs: list[list] = []  # [row, col, rows, columns, element address]
        for chunk in chunks:
            address = pages[chunk.page] * self._page_elements + chunk.offset // self._itemsize
            last = runs[-1] if runs else None
            whole = chunk.columns == width
            if last and whole and last[3] == width and address == last[4] + last[2] * width:
                last[2] += RANK_GRANULE
            else:
                runs.append([chunk.row, chunk.col, RANK_GRANULE, chunk.columns, address])
        return tuple(
            Piece(row, col, self._flat[at : at + rows * cols].view(rows, cols)) for row, col, rows, cols, at in runs
        )
