"""Every part of a width is held once, by one rank, or by neighbours where there are fewer units than ranks."""

import pytest

from multilora.distributed.partition import block_parts, even_part, padded_part, padded_size, unit_part


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_equal_parts_follow_each_other(size: int) -> None:
    parts = [even_part(96, rank, size) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(96))
    assert {len(part) for part in parts} == {96 // size}
    with pytest.raises(ValueError, match="97 cannot be divided"):
        even_part(97, 0, 2)


def test_units_stay_whole() -> None:
    assert [unit_part(64, 16, rank, 2) for rank in range(2)] == [range(32), range(32, 64)]
    with pytest.raises(ValueError, match="4 x 16 columns cannot be divided into 3"):
        unit_part(64, 16, 0, 3)
    with pytest.raises(ValueError, match="4 x 16 columns"):
        unit_part(64, 16, 0, 8)


def test_few_units_are_held_by_several_ranks() -> None:
    parts = [unit_part(32, 16, rank, 8, replicate=True) for rank in range(8)]
    assert parts == [range(16)] * 4 + [range(16, 32)] * 4
    assert unit_part(32, 16, 1, 2, replicate=True) == range(16, 32)
    with pytest.raises(ValueError, match="2 x 16 columns cannot be divided into 3"):
        unit_part(32, 16, 0, 3, replicate=True)


@pytest.mark.parametrize(("blocks", "unit"), [(1, 1), (1, 2), (2, 1), (2, 4)])
def test_every_rank_holds_the_same_part_of_each_block(blocks: int, unit: int) -> None:
    parts = [block_parts(48, blocks, unit, rank, 3) for rank in range(3)]
    each = 48 // blocks
    for block, held in enumerate(zip(*parts, strict=True)):
        assert [i for part in held for i in part] == list(range(block * each, (block + 1) * each))
        assert all(part.start % unit == 0 and len(part) == each // 3 for part in held)
    assert block_parts(48, 2, 1, 1, 3) == (range(8, 16), range(32, 40))
    for wrong in ((33, 2, 1), (33, 1, 5)):
        with pytest.raises(ValueError, match="33 is not"):
            block_parts(*wrong, 0, 2)
    with pytest.raises(ValueError, match="4 cannot be divided into 3"):
        block_parts(12, 1, 3, 0, 3)


@pytest.mark.parametrize(("width", "size"), [(101, 1), (101, 2), (101, 4), (3, 8), (128, 2), (1, 2)])
def test_padded_parts_cover_the_width_once(width: int, size: int) -> None:
    parts = [padded_part(width, rank, size) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(width))
    each = padded_size(width, size)
    assert all(part.start == min(width, rank * each) and len(part) <= each for rank, part in enumerate(parts))
    assert each % 16 == 0 or size == 1
