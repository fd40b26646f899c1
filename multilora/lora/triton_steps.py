"""One step's segments as tiles: the tables that the kernels walk. Pure host code, no kernels.

A tile is at most `tile_rows` rows of one segment. A tile of several rows leaves slots of a fixed grid free: there it
is listed again, as further parts of itself, which share the work. Tiles with the most work come first.

    tiles    int32 [tiles, 8]      row, adapters << 16 | rows, h_start, h_stride, further, place, weight (fp32 bits),
                                   parts << 16 | part
    entries  int32 [further, 2]    place, weight: the second adapter of a composed row and those after it
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from multilora.batch import LoraSegment


@dataclass(frozen=True)
class StepTiles:
    """h_size: elements of the intermediate that the tiles need at the widest site (of one split)."""

    tiles: np.ndarray
    entries: np.ndarray
    h_size: int


def make_tiles(
    segments: tuple[LoraSegment, ...], tile_rows: int, stacked_rank: Callable[[int], int], max_parts: int = 1
) -> StepTiles:
    """stacked_rank(place): the adapter's largest stacked rank at any site. max_parts: a tile of n rows is listed
    min(n, max_parts) times.
    """
    weights = np.array([w for s in segments for w in s.weights], np.float32).view(np.int32).tolist()
    entries: list[tuple[int, int]] = []
    found: list[tuple[int, ...]] = []  # (rank, row, rows, adapters, further, place, weight)
    at = 0
    for segment in segments:
        count = len(segment.places)
        own = weights[at : at + count]
        at += count
        further = len(entries)
        entries += zip(segment.places[1:], own[1:], strict=True)
        rank = sum(stacked_rank(place) for place in segment.places)
        for row in range(segment.start, segment.end, tile_rows):
            rows = min(tile_rows, segment.end - row)
            found.append((rank, row, rows, count, further, segment.places[0], own[0]))
    found.sort(key=lambda tile: -tile[0])
    table = np.array(found, np.int32).reshape(-1, 7)
    sizes = table[:, 0].astype(np.int64) * table[:, 2]
    ends = np.cumsum(sizes)
    parts = np.minimum(table[:, 2], max_parts)
    whole = np.repeat(np.arange(len(found)), parts)  # [listed] the tile of each
    first = np.cumsum(parts) - parts
    tiles = np.zeros((len(whole), 8), np.int32)
    rank, row, rows, count, further, place, weight = table[whole].T
    tiles[:, 0], tiles[:, 1] = row, count << 16 | rows
    tiles[:, 2], tiles[:, 3] = (ends - sizes)[whole], rank
    tiles[:, 4], tiles[:, 5], tiles[:, 6] = further, place, weight
    tiles[:, 7] = parts[whole] << 16 | (np.arange(len(whole)) - first[whole])
    return StepTiles(tiles, np.array(entries, np.int32).reshape(-1, 2), int(ends[-1]) if len(ends) else 0)
