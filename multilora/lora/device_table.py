"""Where every adapter's panels lie, as tables on the device that the Triton kernels read.

It owns the tables and follows a `LoraTable` (what is installed in which slot). All writes go to the current stream,
in order with the kernels that read, so a captured graph sees every change and never has to be captured again.

    records    int32 [slots, sites, 2 + 2 x slices, padded to a power of two]
                   a_start, stacked rank, (first << 16 | rank, b_start) of slice 0, of slice 1, ...
                                             first: rank rows of the stacked A before the slice's
                                             rank 0: the adapter does not touch the slice
                   of a site of experts: a_start, rank, rank, b_start, a_stride, b_stride: the matrices of expert e
                                             begin e strides later; 0: all experts share one
    addresses  int64 [capacity]              where a part begins in the arena, in elements
                   a_start ->  panels of the stacked A: rank rows 0-7, 8-15, ... (each: its parts, left to right)
                   b_start ->  panels of B of that slice, then (rank's bit 15 is set) its scale-shift pair: fp32
                               scales of a part's columns, then shifts

Capacity is what the arena can hold, so nothing is ever reallocated: a slot per page, addresses for the adapters that
have the most of them per byte.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch

from multilora.kernels.integers import power_of_two
from multilora.lora.panels import RANK_GRANULE, SCALE_SHIFT_BYTES, PanelGeometry, PanelLayout
from multilora.lora.sites import LoraSite, LoraSlice
from multilora.lora.table import LoraTable
from multilora.memory.first_fit import FirstFit
from multilora.transfer import upload_into

SCALE_SHIFT_BIT = 1 << 15


@dataclass(frozen=True)
class _Installed:
    """What the host keeps of one slot."""

    first: int  # index of its first address
    sites: np.ndarray  # int32 [3, sites]: stacked rank, largest rank of a slice, 1 if touched at all
    stacked: int  # the largest stacked rank
    expert: int  # the largest rank at a site of experts


class DeviceTable:
    """`records` and `addresses` of everything installed in `table`, and their summary on the host.

    It is a `TableListener`: `table` calls `installed` and `removed`.
    """

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
        self._intervals = FirstFit(len(self.addresses))
        self._installed: dict[int, _Installed] = {}
        table.subscribe(self)

    def stacked_rank(self, slot: int) -> int:
        """The adapter's largest stacked rank at any site: how many elements one row needs in the intermediate."""
        return self._installed[slot].stacked

    def expert_rank(self, slot: int) -> int:
        """The adapter's largest rank at any site of experts."""
        return self._installed[slot].expert

    def used_sites(self, slots: Collection[int]) -> np.ndarray:
        """int32 [3, sites], over these slots: largest stacked rank, largest rank of a slice, 1 if one acts there."""
        used: np.ndarray = np.max([self._installed[slot].sites for slot in slots], axis=0)
        return used

    def installed(self, slot: int, layout: PanelLayout, pages: list[int]) -> None:
        """See `TableListener`."""
        count = max(1, len(layout.positions))  # an adapter without panels has an interval, too
        first = self._intervals.take(count)
        if first is None:  # rare: the gaps together are large enough, no single one is
            self._compact()
            first = self._intervals.take(count)
            assert first is not None, "more panels than the arena can hold"
        self._write(slot, first, layout, pages)

    def removed(self, slot: int) -> None:
        """See `TableListener`. Nothing is written: no step names the slot until it is installed again."""
        self._intervals.give_back(self._installed.pop(slot).first)

    # ------------------------------------------------------------------ addresses

    def _compact(self) -> None:
        """Move every adapter's addresses down to the end of those before them."""
        moved = self._intervals.compact()
        for slot, installed in list(self._installed.items()):
            self._write(slot, moved[installed.first], *self.table.lookup(slot))

    def _write(self, slot: int, first: int, layout: PanelLayout, pages: list[int]) -> None:
        count = len(layout.positions)
        page, offset = layout.positions[:, 0], layout.positions[:, 1]
        addresses = np.array(pages, np.int64)[page] * self.table.page_elements + offset // self._itemsize
        upload_into(self.addresses[first : first + count], addresses)
        upload_into(self.records[slot], self._records(first, layout))
        sites = self._site_use(layout)
        expert = max((m.rank for m in layout.matrices if m.experts), default=0)
        self._installed[slot] = _Installed(first, sites, int(sites[0].max()), expert)

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
        for matrix, parts in zip(layout.matrices, layout.parts, strict=True):
            if matrix.experts:
                word, stride = (0, 4) if matrix.slice < 0 else (3, 5)
                records[matrix.site, word], records[matrix.site, 1:3] = at, matrix.rank
                records[matrix.site, stride] = len(parts) // matrix.copies if matrix.copies > 1 else 0
            elif matrix.slice < 0:
                records[matrix.site, :2] = at, matrix.rank
                above = 0
            elif matrix.scale_shift:  # its addresses follow those of B; a slice without B has rank 0
                word = 2 + 2 * matrix.slice
                if not records[matrix.site, word] & 0x7FFF:
                    records[matrix.site, word : word + 2] = above << 16, at
                records[matrix.site, word] |= SCALE_SHIFT_BIT
            else:
                word = 2 + 2 * matrix.slice
                records[matrix.site, word : word + 2] = above << 16 | matrix.rank, at
                above += matrix.rank
            at += len(parts)
        return records


def _per_page(sites: tuple[LoraSite, ...], geometry: PanelGeometry) -> tuple[int, int]:
    """Words of one record, and the most addresses per page."""
    words = power_of_two(max(6 if site.experts else 2 + 2 * len(site.slices) for site in sites))
    densest = max(_densest(site, part, geometry) for site in sites for part in site.slices)
    return words, math.ceil(densest * geometry.page_bytes)


def _densest(site: LoraSite, part: LoraSlice, geometry: PanelGeometry) -> float:
    """The most addresses per byte that adapters have at a slice. A panel of A goes with each panel of B, and a pair
    with both, so that a narrow slice takes few; alone come pairs where the base model has a bias, and the matrices of
    experts where these share the other one."""
    panel = RANK_GRANULE * geometry.itemsize
    of_a, of_b = geometry.num_parts(site.in_features), geometry.num_parts(part.out_features)
    bytes_a, bytes_b = panel * site.in_features, panel * part.out_features
    pair = SCALE_SHIFT_BYTES * part.out_features
    found = [(of_a + of_b) / (bytes_a + bytes_b), (of_a + 2 * of_b) / (bytes_a + bytes_b + pair)]
    if part.bias:
        found.append(of_b / pair)
    if site.experts:
        found += [of_a / bytes_a, of_b / bytes_b]
    return max(found)


def table_bytes_per_page(sites: tuple[LoraSite, ...], geometry: PanelGeometry) -> int:
    """Bytes of device memory that the tables of a `DeviceTable` take for each page of the arena."""
    words, addresses = _per_page(sites, geometry)
    return 4 * words * len(sites) + 8 * addresses
