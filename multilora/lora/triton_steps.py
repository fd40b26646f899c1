"""One step's segments as tiles: the tables that the kernels walk. Pure host code, no kernels.

A tile is at most `tile_rows` rows of one segment, and the unit of a program. Tiles with the most work come first.

    tiles    int32 [tiles, 8]      row, rows, h_start, entries, further, place, weight (fp32 bits), -
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


def make_tiles(segments: tuple[LoraSegment, ...], tile_rows: int, stacked_rank: Callable[[int], int]) -> StepTiles:
    """stacked_rank(place): the adapter's largest stacked rank at any site."""
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
    tiles = np.zeros((len(found), 8), np.int32)
    tiles[:, 0:2] = table[:, 1:3]
    tiles[:, 2] = ends - sizes
    tiles[:, 3:7] = table[:, 3:7]
    return StepTiles(tiles, np.array(entries, np.int32).reshape(-1, 2), int(ends[-1]) if len(ends) else 0)
