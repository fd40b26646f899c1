"""Pairs of texts, cosines and ranks. What a server makes of them is tested in `server/pooling` and `llm`."""

import numpy as np
import pytest

from multilora.errors import BadRequest
from multilora.front.scoring import TextPairs, cosine, ranking

PARAMS = ("queries", "documents")


def test_one_with_all_or_each_with_its_own() -> None:
    assert [TextPairs(["q"], ["a", "b"], PARAMS).of(i) for i in range(2)] == [0, 0]
    assert [TextPairs(["q", "r"], ["a", "b"], PARAMS).of(i) for i in range(2)] == [0, 1]


@pytest.mark.parametrize(
    ("first", "second", "param"),
    [
        ([], ["a"], "queries"),
        (["q"], [], "documents"),
        (["q"] * 2, ["a"] * 3, "queries"),
        (["q"], ["a"] * 4097, "documents"),
    ],
)
def test_lengths(first: list[str], second: list[str], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        TextPairs(first, second, PARAMS)
    assert caught.value.param == param


def test_cosines() -> None:
    one, other = np.array([3.0, 4.0], np.float32), np.array([4.0, 3.0], np.float32)
    assert cosine(one, other) == pytest.approx(24 / 25)
    assert cosine(one, -one) == pytest.approx(-1)
    assert cosine(one, np.zeros(2, np.float32)) == 0


def test_ranks() -> None:
    assert ranking([0.5, 2.0, 0.5, -1.0]) == [1, 0, 2, 3]
