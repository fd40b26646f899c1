"""Heads that a request needs, the token that a text is classified by, and what scores become."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from multilora.engine.messages import Ready
from multilora.errors import BadRequest
from multilora.front.adapter_ref import Held
from multilora.front.classification import (
    CLASSIFY,
    check_head,
    classification_of,
    classified_tokens,
    num_labels,
    probabilities,
    sigmoid,
)
from multilora.front.generation import Job, Sample
from multilora.params import ClassifierSettings, PoolingParams, SamplingParams

SAMPLING = SamplingParams()
TWO = ClassifierSettings(labels=("bad", "good"))


def ready(classifier: ClassifierSettings | None = None, *, generates: bool = True) -> Ready:
    return cast(Ready, SimpleNamespace(classifier=classifier, generates=generates))


def held(*labels: int) -> Held:
    refs = [SimpleNamespace(name=f"a{n}", info=SimpleNamespace(num_labels=n)) for n in labels]
    return cast(Held, SimpleNamespace(refs=refs))


def test_whose_head_it_is() -> None:
    assert num_labels(held(), ready()) == 0
    assert num_labels(held(), ready(TWO)) == 2
    assert num_labels(held(5), ready(TWO)) == 5
    assert num_labels(held(0), ready(TWO)) == 2
    assert num_labels(held(0, 0), ready(TWO)) == 2


def test_what_has_no_such_head() -> None:
    generate, embed, classify = (
        Job(prompt=[1], sampling=SAMPLING, pooling=p) for p in (None, PoolingParams(), CLASSIFY)
    )
    for job, whose, model in ((generate, held(), ready()), (embed, held(), ready()), (classify, held(3), ready())):
        check_head(job, whose, model)
    check_head(classify, held(), ready(TWO, generates=False))
    for job, whose, model, words in (
        (generate, held(), ready(TWO, generates=False), "it is a classifier"),
        (generate, held(3), ready(generates=False), "it is a decoder alone"),
        (classify, held(), ready(), "the base model has none"),
        (classify, held(0), ready(), "neither the base model nor a0"),
    ):
        with pytest.raises(BadRequest, match=words) as caught:
            check_head(job, whose, model)
        assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("ids", "read"),
    [([5, 6], [5, 6]), ([5, 0, 6, 0, 0], [5, 0, 6]), ([0, 0], [0]), ([0], [0]), ([0, 5], [0, 5])],
)
def test_the_token_that_classifies(ids: list[int], read: list[int]) -> None:
    assert classified_tokens(ids, 0) == read
    assert classified_tokens(ids, None) == ids


def sample(*scores: float) -> Any:
    pooled = np.array(scores, "<f4").tobytes()
    return cast(Sample, SimpleNamespace(stream=SimpleNamespace(pooled=pooled, finished=None)))


def test_labels() -> None:
    assert classification_of(sample(1.0, 2.0), TWO).label == "good"
    assert classification_of(sample(1.0, 2.0, 0.0), TWO).label == "LABEL_1"
    assert classification_of(sample(1.0, 2.0), None).label == "LABEL_1"


def test_probabilities() -> None:
    scores = np.array([1000.0, 1001.0], np.float32)
    np.testing.assert_allclose(probabilities(scores, ""), [1 / (1 + np.e), np.e / (1 + np.e)], rtol=1e-6)
    np.testing.assert_allclose(probabilities(scores, "multi_label_classification"), [1, 1])
    np.testing.assert_array_equal(probabilities(scores, "regression"), scores)
    np.testing.assert_allclose(probabilities(np.zeros(1, np.float32), ""), [0.5])
    np.testing.assert_allclose(sigmoid(np.array([-1000.0, 0, 1000], np.float32)), [0, 0.5, 1])
