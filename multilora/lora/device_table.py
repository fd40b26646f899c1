"""Where every adapter's panels lie, as tables on the device that kernels read.

Owns the tables; follows a `LoraTable` (what is installed at which place). All writes go to the current stream, in
order with the kernels that read, so that a captured graph sees every change and never has to be captured again.

    records    int32 [places, sites, 2 + 2 x slices, padded]
                   a_start, stacked rank, (first << 16 | rank, b_start) of slice 0, of slice 1, ...
                                             first: rank rows of the stacked A before the slice's
                                             rank 0: the adapter does not touch the slice
    addresses  int64 [capacity]              where a chunk begins in the arena, in elements
                   a_start ->  panels of the stacked A: rank rows 0-7, 8-15, ... (each: its chunks, left to right)
                   b_start ->  panels of B of that slice, then (rank's bit 15 is set) its scale-shift pair: fp32
                               scales of a chunk's columns, then shifts

Capacity is what the arena can hold, so nothing is ever reallocated: a place per page, an address per smallest panel.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch

from multilora.lora.panels import SCALE_SHIFT_BYTES, PanelGeometry, PanelLayout
from multilora.lora.sites import LoraSite
from multilora.lora.table import LoraTable

SCALE_SHIFT_BIT = 1 << 15


@dataclass(frozen=True)
class _Placed:
    first: int  # address
    count: int  # of addresses
    sites: np.ndarray  # int32 [3, sites]: stacked rank, largest rank of a slice, 1 if touched at all
    stacked: int  # the largest stacked rank


class DeviceTable:
    """`records` and `addresses` of everything installed in `table`, and what the host must know of it."""

    def __init__(self, table: LoraTable, sites: tuple[LoraSite, ...]):
        self.sites = sites
        self.table = table
        self.weights = table.weights
        self._itemsize = self.weights.itemsize
        self.geometry = PanelGeometry(table.page_elements * self._itemsize, self._itemsize)
        self.record_words, addresses = _per_page(sites, self.geometry)
        device = self.weights.device
        shape = (table.num_pages, len(sites), self.record_words)
        self.records = torch.zeros(shape, dtype=torch.int32, device=device)
        self.addresses = torch.zeros(table.num_pages * addresses, dtype=torch.int64, device=device)
        self._placed: dict[int, _Placed] = {}
        table.subscribe(self)

    def stacked_rank(self, slot: int) -> int:
        """The largest stacked rank of the adapter at any site: what one of its rows needs of the intermediate."""
        return self._placed[slot].stacked

    def used_sites(self, slots: Collection[int]) -> np.ndarray:
        """Of these adapters together, int32 [3, sites]: largest stacked rank, largest rank of a slice, whether one
        of them touches the site at all."""
        used: np.ndarray = np.max([self._placed[slot].sites for slot in slots], axis=0)
        return used

    def installed(self, slot: int, layout: PanelLayout, pages: list[int]) -> None:
        first = self._find(len(layout.positions))
        if first is None:
            first = self._compact()
        self._write(slot, first, layout, pages)

    def removed(self, slot: int) -> None:
        """Nothing to write: no step names the slot until another adapter is installed there."""
        del self._placed[slot]

    # ------------------------------------------------------------------ addresses

    def _find(self, count: int) -> int | None:
        """The first gap of `count` addresses."""
        at = 0
        for first, size in sorted((installed.first, installed.count) for installed in self._placed.values()):
            if first - at >= count:
                return at
            at = first + size
        return at if len(self.addresses) - at >= count else None

    def _compact(self) -> int:
        """Close all gaps; returns where free space begins. Rare: the gaps have to add up first."""
        at = 0
        for slot, installed in sorted(self._placed.items(), key=lambda item: item[1].first):
            self._write(slot, at, *self.table.lookup(slot))
            at += installed.count
        return at

    def _write(self, slot: int, first: int, layout: PanelLayout, pages: list[int]) -> None:
        count = len(layout.positions)
        assert first + count <= len(self.addresses)
        page, offset = layout.positions[:, 0], layout.positions[:, 1]
        addresses = np.array(pages, np.int64)[page] * self.table.page_elements + offset // self._itemsize
        upload(addresses, self.addresses[first : first + count])
        upload(self._records(first, layout), self.records[slot])
        sites = self._site_use(layout)
        self._placed[slot] = _Placed(first, count, sites, int(sites[0].max()))

    def _site_use(self, layout: PanelLayout) -> np.ndarray:
        use = np.zeros((3, len(self.sites)), np.int32)
        for matrix in layout.matrices:
            row = 0 if matrix.slice < 0 else 1
            use[row, matrix.site] = max(use[row, matrix.site], matrix.rank)
            use[2, matrix.site] = 1
        return use

    def _records(self, first: int, layout: PanelLayout) -> np.ndarray:
        records = np.zeros((len(self.sites), self.record_words), np.int32)
        at, above = first, 0
        for matrix, chunks in zip(layout.matrices, layout.chunks, strict=True):
            if matrix.slice < 0:
                records[matrix.site, :2] = at, matrix.rank
                above = 0
            elif matrix.scale_shift:  # right behind B, or alone
                word = 2 + 2 * matrix.slice
                if not records[matrix.site, word] & 0x7FFF:
                    records[matrix.site, word : word + 2] = above << 16, at
                records[matrix.site, word] |= SCALE_SHIFT_BIT
            else:
                word = 2 + 2 * matrix.slice
                records[matrix.site, word : word + 2] = above << 16 | matrix.rank, at
                above += matrix.rank
            at += len(chunks)
        return records


def _per_page(sites: tuple[LoraSite, ...], geometry: PanelGeometry) -> tuple[int, int]:
    """Words of a record, and as many addresses as chunks can lie in a page: a scale-shift pair is the smallest."""
    words = _power_of_two(2 + 2 * max(len(site.slices) for site in sites))
    widths = {site.in_features for site in sites} | {s.out_features for site in sites for s in site.slices}
    smallest = min(geometry.chunk_columns(w) for w in widths) * SCALE_SHIFT_BYTES
    return words, geometry.page_bytes // smallest


def table_bytes_per_page(sites: tuple[LoraSite, ...], geometry: PanelGeometry) -> int:
    """What the tables of a `DeviceTable` take for each page of the arena."""
    words, addresses = _per_page(sites, geometry)
    return 4 * words * len(sites) + 8 * addresses


def upload(values: np.ndarray, to: torch.Tensor) -> None:
    """Copy to the device on the current stream without waiting. The pinned buffer is reused once the copy is done
    (PyTorch's host allocator records an event)."""
    source = torch.from_numpy(values)
    to.copy_(source.pin_memory() if to.is_cuda else source, non_blocking=True)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
