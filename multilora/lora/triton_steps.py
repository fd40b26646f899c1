"""One step's segments as tiles: the tables that the kernels walk, and what is launched for them. Host side only.

A tile is at most `tile_rows` rows of one segment. A tile of several rows leaves programs of a fixed grid idle; so it
is listed again, as further parts of itself, which share the work. Tiles with the most work come first.
Called by `triton_backend.py`.

    tiles    int32 [tiles, 8]      row, adapters << 16 | rows, h_start, h_stride, further, slot, weight (fp32 bits),
                                   parts << 16 | part
                                   (rows without an adapter: row, rows, then zeros, 1 << 16)
    entries  int32 [further, 2]    slot, weight: the second adapter of a composed row and those after it
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from multilora.batch import LoraSegment
from multilora.kernels.integers import cdiv, power_of_two
from multilora.kernels.triton_launch import Repeated
from multilora.lora.sites import LoraSite
from multilora.lora.triton_panels import ENTRY_WORDS, TILE_WORDS
from multilora.lora.tuning import Phase

Segments = tuple[LoraSegment, ...]

MIN_TILE = 16
"""The fewest rows and rank rows that `tl.dot` takes; also the rows of a tile in a small step."""

MAX_RANK = 1 << 15

H_ALIGN = 16


@dataclass(frozen=True)
class StepTiles:
    """h_size: elements of the intermediate that the tiles need at the widest site (of one split)."""

    tiles: np.ndarray
    entries: np.ndarray
    h_size: int


def make_tiles(
    segments: Segments, tile_rows: int, stacked_rank: Callable[[int], int], max_parts: int = 1
) -> StepTiles:
    """The tables of these segments. stacked_rank(slot): the adapter's largest stacked rank at any site; max_parts: a
    tile of n rows is listed min(n, max_parts) times.
    """
    weights = np.array([w for s in segments for w in s.weights], np.float32).view(np.int32).tolist()
    entries: list[tuple[int, int]] = []
    found: list[tuple[int, ...]] = []  # (rank, row, rows, adapters, further, slot, weight)
    at = 0
    for segment in segments:
        count = len(segment.slots)
        own = weights[at : at + count]
        at += count
        further = len(entries)
        entries += zip(segment.slots[1:], own[1:], strict=True)
        rank = sum(stacked_rank(slot) for slot in segment.slots)
        for row in range(segment.start, segment.end, tile_rows):
            rows = min(tile_rows, segment.end - row)
            found.append((rank, row, rows, count, further, segment.slots[0], own[0]))
    found.sort(key=lambda tile: -tile[0])
    table = np.array(found, np.int32).reshape(-1, 7)
    sizes = table[:, 0].astype(np.int64) * table[:, 2]
    ends = np.cumsum(sizes)
    parts = np.minimum(table[:, 2], max_parts)
    tile_of = np.repeat(np.arange(len(found)), parts)  # [listed]
    first = np.cumsum(parts) - parts
    tiles = np.zeros((len(tile_of), 8), np.int32)
    rank, row, rows, count, further, slot, weight = table[tile_of].T
    tiles[:, 0], tiles[:, 1] = row, count << 16 | rows
    tiles[:, 2], tiles[:, 3] = (ends - sizes)[tile_of], rank
    tiles[:, 4], tiles[:, 5], tiles[:, 6] = further, slot, weight
    tiles[:, 7] = parts[tile_of] << 16 | (np.arange(len(tile_of)) - first[tile_of])
    return StepTiles(tiles, np.array(entries, np.int32).reshape(-1, 2), int(ends[-1]) if len(ends) else 0)


def in_single_rows(segments: Segments, few_rows: int) -> Segments:
    """Split segments of up to `few_rows` rows and one adapter into segments of one row each: reading the weights
    again, from the L2 cache, costs less than a tile that is nearly empty."""
    found: list[LoraSegment] = []
    for s in segments:
        few = 1 < s.end - s.start <= few_rows and len(s.slots) == 1
        found += [replace(s, start=row, end=row + 1) for row in range(s.start, s.end)] if few else [s]
    return tuple(found)


def split_singles(segments: Segments) -> tuple[Segments, Segments]:
    """Segments of several rows or adapters, and those of one row and one adapter (decodes in a large step)."""
    singles = tuple(s for s in segments if s.end - s.start == 1 and len(s.slots) == 1)
    return tuple(s for s in segments if s.end - s.start > 1 or len(s.slots) > 1), singles


def base_tiles(segments: Segments, num_rows: int, tile_rows: int) -> np.ndarray:
    """Tiles without an adapter for the rows outside these segments, int32 [tiles, 8]."""
    ends = [0, *(s.end for s in segments)]
    starts = [*(s.start for s in segments), num_rows]
    found = [
        (row, min(tile_rows, start - row))
        for end, start in zip(ends, starts, strict=True)
        for row in range(end, start, tile_rows)
    ]
    tiles = np.zeros((len(found), 8), np.int32)
    tiles[:, :2] = np.array(found, np.int32).reshape(-1, 2)
    tiles[:, 7] = 1 << 16
    return tiles


CAPTURED_SEGMENTS = 64
"""Segments of several rows in a large step that is captured: their last tiles are not full."""

CAPTURED_SINGLES = 64
"""Single rows in such a step. Programs for those that there are not cost 2 µs a launch."""

FURTHER = 256
"""Entries of the fixed tables: the second and further adapters of composed rows."""


@dataclass(frozen=True)
class CapturedTables:
    """Where the tables of a large step that is captured lie, in words, and for how many tiles there is room: entries,
    tiles with adapters, behind them those of base rows, single rows.

    room, gated: tiles with adapters, and with those of base rows; whatever the segments are.
    """

    room: int
    gated: int
    tiles_at: int
    singles_at: int

    @classmethod
    def of(cls, num_rows: int, tile_rows: int) -> "CapturedTables":
        """For so many rows. Between some segments lies one more gap than there are of them."""
        room = num_rows // tile_rows + CAPTURED_SEGMENTS
        gated, at = room + CAPTURED_SEGMENTS + 1, FURTHER * ENTRY_WORDS
        return cls(room, gated, at, at + gated * TILE_WORDS)

    def words(self, tiles: StepTiles, base: np.ndarray, singles: StepTiles) -> np.ndarray | None:
        """The tables of a step, int32; None: there is no room for them. base: see `base_tiles`."""
        if len(tiles.entries) > FURTHER or len(singles.tiles) > CAPTURED_SINGLES:
            return None
        if len(tiles.tiles) > self.room or len(tiles.tiles) + len(base) > self.gated:
            return None
        words = np.zeros(self.singles_at + CAPTURED_SINGLES * TILE_WORDS, np.int32)
        parts = (0, tiles.entries), (self.tiles_at, tiles.tiles), (self.singles_at, singles.tiles)
        for start, part in (*parts, (self.tiles_at + tiles.tiles.size, base)):
            words[start : start + part.size] = part.ravel()
        return words


@dataclass(frozen=True)
class LaunchGroup:
    """Tiles that are launched together.

    h: their own intermediate, fp32, flat; use: see `DeviceTable.used_sites` (None: any adapters may come, as the
    launches are being captured).
    """

    tiles: torch.Tensor
    grid: int  # programs along the tiles
    h: torch.Tensor
    use: list[list[int]] | None
    blocks: Phase
    vector: bool
    tile_rows: int
    any_rank: bool  # one kernel serves every rank
    launches: dict[tuple[object, ...], Repeated] = field(default_factory=dict)  # made for one layer, serve them all

    def rank(self, site: int, stacked: bool) -> int:
        """The largest rank at a site, stacked or of a slice; MAX_RANK if anything may come."""
        return MAX_RANK if self.use is None else self.use[0 if stacked else 1][site]

    def touches(self, site: int) -> bool:
        """Whether any adapter of these tiles acts at the site."""
        return self.use is None or bool(self.use[2][site])

    def tile_r(self, most: int, rank: int) -> int:
        """Rank rows of one `tl.dot`."""
        return most if self.any_rank else max(MIN_TILE, min(most, power_of_two(rank)))

    def parts(self, most: int, rank: int, tile_r: int, early: bool) -> int:
        """How many programs share the rank rows of a tile in shrink: one for each `tl.dot` if the grid is exact."""
        if not self.any_rank:
            return cdiv(rank, tile_r)
        return 1 if early else most

    def splits(self, site: LoraSite) -> int:
        return splits_of(self.blocks, site)

    def h_split(self, splits: int) -> int:
        """Elements from one split of the intermediate to the next."""
        return self.h.shape[0] // splits // H_ALIGN * H_ALIGN


@dataclass(frozen=True)
class Step:
    """What the launches of one step need. gated: the number of tiles, those of groups[0] and the base rows after
    them, that cover all rows for the gated kernel; 0: gate and up are expanded as every other site is."""

    groups: tuple[LaunchGroup, ...]
    entries: torch.Tensor
    gated: int
    overlap: bool  # kernels start early
    beside: bool  # shrink runs beside the layer's own product


def splits_of(blocks: Phase, site: LoraSite) -> int:
    return cdiv(site.in_features, blocks.shrink(site.in_features).k)
