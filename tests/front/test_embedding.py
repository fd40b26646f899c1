"""What is made of a pooled row, and which words of a request are understood."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from multilora.errors import BadRequest, MultiloraError
from multilora.front.embedding import check_dimensions, check_method, embedding_job, vector_of
from multilora.front.generation import Sample
from multilora.front.stream import FinishReason
from multilora.params import EmbeddingSettings, PoolingParams


def sample(*numbers: float) -> Sample:
    pooled = np.array(numbers, "<f4").tobytes()
    return cast(Sample, SimpleNamespace(stream=SimpleNamespace(pooled=pooled, finished=FinishReason("length"))))


def test_truncated_first_then_scaled() -> None:
    row = sample(3.0, 4.0, 12.0)
    np.testing.assert_allclose(vector_of(row, 2, normalize=True), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(vector_of(row, None, normalize=True), np.array([3, 4, 12]) / 13, rtol=1e-6)
    np.testing.assert_array_equal(vector_of(row, 2, normalize=False), np.array([3, 4], np.float32))


def test_nothing_is_made_of_what_was_aborted() -> None:
    aborted = sample()
    aborted.stream.finished = FinishReason("abort", message="by its client")
    with pytest.raises(MultiloraError, match="by its client"):
        vector_of(aborted, None, normalize=True)


def test_a_row_of_zeros_stays_one() -> None:
    assert vector_of(sample(0.0, 0.0), None, normalize=True).tolist() == [0.0, 0.0]


def test_the_model_decides_what_a_request_leaves_open() -> None:
    settings = EmbeddingSettings(size=8, method="mean")
    assert embedding_job([1, 2], settings, None).pooling == PoolingParams("mean")
    job = embedding_job([1, 2], settings, "cls", priority=3)
    assert (job.pooling, job.priority, job.sampling.max_new_tokens) == (PoolingParams("cls"), 3, 0)


@pytest.mark.parametrize(("value", "method"), [(None, None), ("last", "last"), ("MEAN", "mean")])
def test_methods(value: Any, method: str | None) -> None:
    assert check_method(value, "pooling") == method


@pytest.mark.parametrize("value", ["max", 3, ""])
def test_no_method(value: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        check_method(value, "pooling")
    assert caught.value.param == "pooling"


@pytest.mark.parametrize("value", [0, -1, 9])
def test_no_dimensions(value: int) -> None:
    with pytest.raises(BadRequest, match="1 to 8") as caught:
        check_dimensions(value, 8)
    assert caught.value.param == "dimensions"
    assert check_dimensions(None, 8) is None
    assert check_dimensions(8, 8) == 8
