"""Where every adapter's panels lie, as tables on the device that kernels read.

Owns the tables; follows a `LoraTable` (what is installed at which place). All writes go to the current stream, in
order with the kernels that read, so that a captured graph sees every change and never has to be captured again.

    records    int32 [places, sites, 2 + 2 x slices, padded]
                   a_start, stacked rank, (first << 16 | rank, b_start) of slice 0, of slice 1, ...
                                             first: rank rows of the stacked A before the slice's
                                             rank 0: the adapter does not touch the slice
    addresses  int64 [capacity]              where a chunk begins in the arena, in elements
                   a_start ->  panels of the stacked A: rank rows 0-7, 8-15, ... (each: its chunks, left to right)
                   b_start ->  panels of B of that slice, then (rank's bit 15 is set) its affine pair: fp32 scales
                               of a chunk's columns, then shifts

Capacity is what the arena can hold, so nothing is ever reallocated: a place per page, an address per smallest panel.
"""

import numpy as np
import torch

from multilora.lora.panels import RANK_GRANULE, PanelGeometry, PanelLayout
from multilora.lora.sites import LoraSite
from multilora.lora.table import LoraTable

AFFINE_BIT = 1 << 15


class DeviceTable:
    """`records` and `addresses` of everything installed in `table`."""

    def __init__(self, table: LoraTable, sites: tuple[LoraSite, ...]):
        self.sites = sites
        self.table = table
        self.weights = table.weights
        self.max_slices = max(len(site.slices) for site in sites)
        self.record_words = _power_of_two(2 + 2 * self.max_slices)
        self._itemsize = self.weights.itemsize
        self.geometry = PanelGeometry(table.page_elements * self._itemsize, self._itemsize)
        capacity = table.num_pages * (self.geometry.page_bytes // self._smallest_panel())
        device = self.weights.device
        shape = (table.num_pages, len(sites), self.record_words)
        self.records = torch.zeros(shape, dtype=torch.int32, device=device)
        self.addresses = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._ranges: dict[int, tuple[int, int]] = {}  # place → (first address, how many)
        self._stacked: dict[int, int] = {}
        table.subscribe(self)

    def stacked_rank(self, place: int) -> int:
        """The largest stacked rank of the adapter at any site: what one of its rows needs of the intermediate."""
        return self._stacked[place]

    def installed(self, place: int, layout: PanelLayout, pages: list[int]) -> None:
        count = len(layout.places)
        first = self._find(count)
        if first is None:
            first = self._compact()
        self._write(place, first, layout, pages)
        self._stacked[place] = max((m.rank for m in layout.matrices if m.slice < 0), default=0)

    def removed(self, place: int) -> None:
        """Nothing to write: no step names the place until another adapter is installed there."""
        del self._ranges[place], self._stacked[place]

    # ------------------------------------------------------------------ addresses

    def _smallest_panel(self) -> int:
        widths = {site.in_features for site in self.sites} | {s.out_features for t in self.sites for s in t.slices}
        return min(self.geometry.chunk_columns(w) for w in widths) * RANK_GRANULE * self._itemsize

    def _find(self, count: int) -> int | None:
        """The first gap of `count` addresses."""
        at = 0
        for first, size in sorted(self._ranges.values()):
            if first - at >= count:
                return at
            at = first + size
        return at if len(self.addresses) - at >= count else None

    def _compact(self) -> int:
        """Close all gaps; returns where free space begins. Rare: the gaps have to add up first."""
        at = 0
        for place, (_, count) in sorted(self._ranges.items(), key=lambda item: item[1]):
            self._write(place, at, *self.table.placed(place))
            at += count
        return at

    def _write(self, place: int, first: int, layout: PanelLayout, pages: list[int]) -> None:
        count = len(layout.places)
        assert first + count <= len(self.addresses)
        page, offset = layout.places[:, 0], layout.places[:, 1]
        addresses = np.array(pages, np.int64)[page] * self.table.page_elements + offset // self._itemsize
        upload(addresses, self.addresses[first : first + count])
        upload(self._records(first, layout), self.records[place])
        self._ranges[place] = (first, count)

    def _records(self, first: int, layout: PanelLayout) -> np.ndarray:
        records = np.zeros((len(self.sites), self.record_words), np.int32)
        at, above = first, 0
        for matrix, chunks in zip(layout.matrices, layout.chunks, strict=True):
            if matrix.slice < 0:
                records[matrix.site, :2] = at, matrix.rank
                above = 0
            elif matrix.affine:  # right behind B, or alone
                word = 2 + 2 * matrix.slice
                if not records[matrix.site, word] & 0x7FFF:
                    records[matrix.site, word : word + 2] = above << 16, at
                records[matrix.site, word] |= AFFINE_BIT
            else:
                word = 2 + 2 * matrix.slice
                records[matrix.site, word : word + 2] = above << 16 | matrix.rank, at
                above += matrix.rank
            at += len(chunks)
        return records


def upload(values: np.ndarray, to: torch.Tensor) -> None:
    """Copy to the device on the current stream without waiting. The pinned buffer is reused once the copy is done
    (PyTorch's host allocator records an event)."""
    source = torch.from_numpy(values)
    to.copy_(source.pin_memory() if to.is_cuda else source, non_blocking=True)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
