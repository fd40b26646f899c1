"""LoRA on a CPU in C++: all adapters of a step at a site in one call.

The loop of `torch_backend.py` makes two calls and more for each adapter, slice and site, over a thousand in a step
with eight adapters, each of which costs more than its arithmetic. Long segments stay with it: their products are
worth oneDNN's.
"""

import numpy as np
import torch

from multilora.batch import LoraSegment
from multilora.kernels.cpp.library import DTYPES, library
from multilora.lora.panels import PanelLayout
from multilora.lora.table import LoraTable, Piece, SiteWeights
from multilora.lora.torch_backend import TorchLora

MAX_ROWS = 64
"""Rows of a segment up to which it is C++'s."""

_ACTING = np.dtype([("start", "i8"), ("end", "i8"), ("sites", "i8"), ("weight", "f8"), ("first", "i8")])


class CppLora(TorchLora):
    """The contract of `base.py`, for adapters and activations in `library.DTYPES`. Between the adapters of a
    composition nothing is rounded."""

    name = "cpp"

    def __init__(self, table: LoraTable, num_sites: int):
        super().__init__(table)
        self._library = library()
        self._num_sites = num_sites
        self._weight_dtype = DTYPES[table.weights.dtype]
        self._sites: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by slot: addresses by site, and what is there
        self._acting = np.zeros(0, _ACTING)
        self._acting_address = 0
        self._long: tuple[LoraSegment, ...] = ()
        table.subscribe(self)

    def installed(self, slot: int, layout: PanelLayout, pages: list[int]) -> None:
        """See `TableListener`. The addresses are collected when a step first needs them."""

    def removed(self, slot: int) -> None:
        """See `TableListener`."""
        self._sites.pop(slot, None)

    def prepare(
        self,
        segments: tuple[LoraSegment, ...],
        num_rows: int,
        *,
        captured: bool = False,
        decodes: bool = False,
    ) -> None:
        """See `LoraBackend`."""
        super().prepare(segments, num_rows, captured=captured, decodes=decodes)
        self._acting = np.array(
            [
                (segment.start, segment.end, self._addresses(slot), weight, i == 0)
                for segment in segments
                if segment.end - segment.start <= MAX_ROWS
                for i, (slot, weight) in enumerate(zip(segment.slots, segment.weights, strict=True))
            ],
            _ACTING,
        )
        self._acting_address = self._acting.ctypes.data
        self._long = tuple(segment for segment in segments if segment.end - segment.start > MAX_ROWS)

    def apply(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        """See `LoraBackend`."""
        self.add_segments(self._long, y, x, site)
        if len(self._acting):
            assert x.is_contiguous() and y.is_contiguous()
            self._library.add_lora(
                *(self.table.weights.data_ptr(), self._acting_address, len(self._acting), site),
                *(x.data_ptr(), DTYPES[x.dtype], x.shape[1], y.data_ptr(), DTYPES[y.dtype], y.shape[1]),
                self._weight_dtype,
            )

    def _addresses(self, slot: int) -> int:
        """Where the slot's table is: for each site the address of a `Site` of `lora.cpp`, or 0."""
        if slot not in self._sites:
            described = {
                site: self._describe(weights)
                for site in range(self._num_sites)
                if (weights := self.table.site(slot, site)) is not None
            }
            words = np.array([word for words in described.values() for word in words], np.int64)
            addresses = np.zeros(self._num_sites, np.int64)
            at = words.ctypes.data
            for site, own in described.items():
                addresses[site] = at
                at += len(own) * words.itemsize
            self._sites[slot] = addresses, words
        return self._sites[slot][0].ctypes.data

    def _describe(self, weights: SiteWeights) -> list[int]:
        """A `Site` of `lora.cpp`, and what lies behind it."""
        a = [self._part(piece, 0, 0) for piece in weights.a]
        b = [self._part(piece, own.first, own.offset) for own in weights.b for piece in own.pieces]
        pairs = [
            [own.offset + piece.col, piece.weight.shape[1], self._offset(piece)]
            for own in weights.b
            for piece in own.scale_shift
        ]
        return [weights.rank, len(a), len(b), len(pairs), *(word for part in (*a, *b, *pairs) for word in part)]

    def _part(self, piece: Piece, row: int, col: int) -> list[int]:
        """A `Part`, of a matrix that begins at (row, col)."""
        rows, columns = piece.weight.shape
        return [row + piece.row, col + piece.col, rows, columns, self._offset(piece)]

    def _offset(self, piece: Piece) -> int:
        """Where it begins in the arena, in bytes. The arena itself is elsewhere after every sleep."""
        return piece.weight.data_ptr() - self.table.weights.data_ptr()
