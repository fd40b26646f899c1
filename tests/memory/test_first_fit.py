"""First fit: parts never overlap, begin where they may, and a gap is used again."""

import random

from multilora.memory.first_fit import FirstFit


def test_parts_follow_each_other_aligned() -> None:
    parts = FirstFit(100, 16)
    assert [parts.take(n) for n in (10, 16, 1)] == [0, 16, 32]
    assert (parts.take(53), parts.take(52)) == (None, 48)
    assert parts.take(1) is None


def test_the_first_gap_that_is_large_enough() -> None:
    parts = FirstFit(100, 1)
    for n in (10, 20, 5, 30):
        parts.take(n)
    parts.give_back(0)
    parts.give_back(30)
    assert parts.length_of(30) is None and parts.length_of(10) == 20
    assert [parts.take(n) for n in (6, 5, 4, 35)] == [0, 30, 6, 65]


def test_against_a_list_of_bytes() -> None:
    rng = random.Random(1)
    parts, owner, held = FirstFit(256, 8), [0] * 256, {}
    for number in range(1, 2000):
        if held and rng.random() < 0.5:
            start = rng.choice(list(held))
            parts.give_back(start)
            size = held.pop(start)
            owner[start : start + size] = [0] * size
            continue
        size = rng.randrange(1, 40)
        fits = [s for s in range(0, 257 - size, 8) if not any(owner[s : s + size])]
        start = parts.take(size)
        assert start == (fits[0] if fits else None)
        if start is not None:
            held[start] = size
            owner[start : start + size] = [number] * size


def test_compacting_closes_the_gaps_in_order() -> None:
    parts = FirstFit(100, 8)
    for n in (10, 20, 5, 30):
        parts.take(n)  # at 0, 16, 40, 48
    parts.give_back(16)
    assert parts.compact() == {0: 0, 40: 16, 48: 24}
    assert (parts.length_of(16), parts.length_of(24), parts.length_of(40)) == (5, 30, None)
    assert parts.take(45) is None and parts.take(44) == 56
