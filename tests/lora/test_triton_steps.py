"""Which tiles list which rows."""

import numpy as np

from multilora.batch import LoraSegment
from multilora.lora.triton_steps import base_tiles, in_single_rows, make_tiles, split_singles

FEW_ROWS = 4

SEGMENTS = (
    LoraSegment(0, 1, (0,), (1.0,)),
    LoraSegment(1, 2, (0, 1), (1.0, 0.5)),
    LoraSegment(5, 40, (1,), (1.0,)),
    LoraSegment(41, 42, (1,), (2.0,)),
)


def rows_of(tiles: np.ndarray) -> list[int]:
    return sorted(row for first, word, *_ in tiles.tolist() for row in range(first, first + (word & 0xFFFF)))


def test_single_rows_of_one_adapter_go_apart() -> None:
    many, singles = split_singles(SEGMENTS)
    assert many == SEGMENTS[1:3]
    assert singles == (SEGMENTS[0], SEGMENTS[3])


def test_few_rows_of_one_adapter_are_single_rows() -> None:
    few = LoraSegment(3, 3 + FEW_ROWS, (4,), (0.5,))
    composed = LoraSegment(20, 22, (1, 2), (1.0, 1.0))
    many = LoraSegment(30, 31 + FEW_ROWS, (4,), (1.0,))
    found = in_single_rows((few, composed, many), FEW_ROWS)
    assert found == (*(LoraSegment(3 + i, 4 + i, (4,), (0.5,)) for i in range(FEW_ROWS)), composed, many)


def test_every_row_is_listed_once() -> None:
    many, singles = split_singles(SEGMENTS)
    tiles = make_tiles(many, 16, lambda slot: 8).tiles
    base = base_tiles(many, 80, 16)
    assert rows_of(np.concatenate((tiles, base))) == list(range(80))
    assert (base[:, 1] >> 16 == 0).all() and (base[:, 7] == 1 << 16).all()
    assert rows_of(make_tiles(singles, 16, lambda slot: 8).tiles) == [0, 41]


def test_no_base_rows_and_nothing_else() -> None:
    assert len(base_tiles((LoraSegment(0, 20, (0,), (1.0,)),), 20, 16)) == 0
    assert rows_of(base_tiles((), 20, 16)) == list(range(20))
