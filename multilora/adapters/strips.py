"""Packing of low-rank weights: panels that lie back to back are written in one go.

A weight stays in the file's dtype until it is written: scaled in fp32, rounded once, moved as integers, B transposed
in tiles that fit a core's first cache. That takes about ten calls a weight, and nearly all of the time goes into code
that releases the GIL. Called by `blocks.pack`, on several threads; knows neither sites nor blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from multilora.adapters.crew import Crew
from multilora.lora.panels import RANK_GRANULE, Chunk

TILE_BYTES = 32 << 10
SIGNED = {2: torch.int16, 4: torch.int32}
UNSIGNED = {2: np.uint16, 4: np.uint32}


@dataclass(frozen=True)
class Strip:
    """One weight and its panels. weight: [rank, width], transposed or not; chunks: as in `PanelLayout`."""

    name: str  # for errors: "layer 3 q_proj lora_A"
    weight: torch.Tensor
    scaling: float
    chunks: tuple[Chunk, ...]


class PageNumbers:
    """The pages of one adapter as one row of integers of the dtype's size. out: uint8 [pages, page_bytes]."""

    def __init__(self, out: torch.Tensor, dtype: torch.dtype):
        self._dtype = dtype
        self._page = out.shape[1] // dtype.itemsize
        self.numbers = out.view(-1).view(SIGNED[dtype.itemsize]).numpy()
        infinite = torch.tensor([torch.inf, -torch.inf], dtype=dtype).view(SIGNED[dtype.itemsize]).numpy()
        self._inf, self._minus_inf = int(infinite[0]), int(infinite.view(UNSIGNED[dtype.itemsize])[1])

    def write(self, strip: Strip) -> None:
        weight = _cast(strip.weight, strip.scaling, self._dtype)
        source = weight.view(SIGNED[self._dtype.itemsize]).numpy()  # [rank, width]
        tile = source.shape[1]
        if not weight.is_contiguous():
            tile = max(1, TILE_BYTES // (source.shape[0] * self._dtype.itemsize))
        for row, col, target in self._runs(strip):
            rows, columns = target.shape
            for first in range(0, columns, tile):
                last = min(first + tile, columns)
                np.copyto(target[:, first:last], source[row : row + rows, col + first : col + last])

    def all_finite(self, crew: Crew) -> bool:
        """Every number of every page, whatever it is."""
        found: list[bool] = []
        crew.each(lambda page: found.append(self.finite(page)), list(self.numbers.reshape(-1, self._page)))
        return all(found)

    def is_finite(self, strip: Strip) -> bool:
        """What `write` has written."""
        return all(self.finite(target) for _, _, target in self._runs(strip))

    def finite(self, numbers: np.ndarray) -> bool:
        """As bits, an infinity lies above all finite numbers of its sign and below every NaN."""
        unsigned = numbers.view(UNSIGNED[self._dtype.itemsize])
        return bool(numbers.max() < self._inf and unsigned.max() < self._minus_inf)

    def _runs(self, strip: Strip) -> Iterator[tuple[int, int, np.ndarray]]:
        """Panels, or parts of them, that lie back to back: row and column of the weight, [rows, columns] of pages."""
        rank, chunks = strip.weight.shape[0], strip.chunks
        top, itemsize = chunks[0].row, self._dtype.itemsize
        first = 0
        while first < len(chunks):
            chunk = chunks[first]
            size = RANK_GRANULE * chunk.columns * itemsize
            count = 1
            while first + count < len(chunks) and _follows(chunk, chunks[first + count], count, size):
                count += 1
            row = chunk.row - top
            rows = min(RANK_GRANULE * count, rank - row)
            at = chunk.page * self._page + chunk.offset // itemsize
            yield row, chunk.col, self.numbers[at : at + rows * chunk.columns].reshape(rows, chunk.columns)
            first += count


def _follows(first: Chunk, other: Chunk, count: int, size: int) -> bool:
    """Is `other` where the panel number `count` behind `first` would be, without a gap?"""
    return (other.page, other.offset, other.col, other.row) == (
        first.page,
        first.offset + count * size,
        first.col,
        first.row + count * RANK_GRANULE,
    )


def _cast(weight: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """weight · scaling, computed in fp32 and rounded once; in the weight's own order of memory."""
    if scaling == 1.0:
        return weight.to(dtype)
    exact = weight if weight.dtype in (dtype, torch.float32) else weight.float()
    return torch.mul(exact, scaling, out=torch.empty_like(exact, dtype=dtype))
