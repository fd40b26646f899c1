import random

import pytest

from multilora.engine.messages import Submit
from multilora.engine.scheduling.page_namespaces import PageNamespaces
from multilora.engine.scheduling.request import Progress, Request, RequestSpec, last_occurrence
from multilora.params import SamplingParams


@pytest.mark.parametrize(
    ("tokens", "wanted", "start"),
    [
        ([5], [5], 0),
        ([5, 6, 5, 6], [5, 6], 2),
        ([7, 7, 7], [7, 7], 1),  # it may overlap itself
        ([5, 6, 5], [5, 6], 0),  # cut short at the end
        ([6], [5, 6], None),
        ([], [5], None),
        ([1, 2, 3], [3, 2], None),
    ],
)
def test_last_occurrence(tokens, wanted, start):
    assert last_occurrence(tokens, wanted) == start


def test_last_occurrence_agrees_with_a_plain_search():
    rng = random.Random(0)
    for _ in range(500):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(12))]
        wanted = [rng.randrange(2) for _ in range(rng.randrange(1, 4))]
        found = [i for i in range(len(tokens)) if tokens[i : i + len(wanted)] == wanted]
        assert last_occurrence(tokens, wanted) == (found[-1] if found else None)


def make(prompt, adapters, invocation=None) -> RequestSpec:
    message = Submit(rid="r", input_ids=prompt, sampling=SamplingParams(), adapters=adapters)
    return RequestSpec.of(message, invocation, seed=0, order=1, arrival=0.0, vocab_size=99)


def test_the_order_of_adapters_is_without_meaning():
    request = make([1], ((9, 0.5), (3, 2.0)))
    assert request.adapters == ((3, 2.0), (9, 0.5))
    assert (request.versions, request.weights) == ((3, 9), (2.0, 0.5))


def test_activation():
    request = make([1, 5, 6, 5, 6, 1], ((3, 1.0),), (5, 6))
    assert (request.adapters, request.activation) == (((3, 1.0),), 3)
    assert (make([5, 6], ((3, 1.0),), (5, 6)).activation, make([5, 6], ((3, 1.0),)).activation) == (0, 0)


def test_without_the_invocation_tokens_it_is_a_request_to_base():
    request = make([1, 5], ((3, 1.0),), (5, 6))
    assert (request.adapters, request.activation) == ((), 0)


def test_namespaces_by_page():
    assert [PageNamespaces(2, 8, 9).of(page) for page in range(5)] == [0, 0, 8, 9, 9]
    assert [PageNamespaces(0, 4, 4).of(page) for page in range(2)] == [4, 4]


def test_the_marks_of_a_request_move_in_order():
    progress = Progress(num_prompt=6)
    progress.restart(4)
    progress.schedule(2, sampled=1)
    assert (progress.remaining, progress.decoding) == (1, True)
    progress.schedule(1, sampled=1)  # one ahead: the token is still being sampled
    progress.commit(2)
    progress.take_token(9)
    assert (progress.num_computed, progress.num_scheduled, progress.num_tokens, progress.in_flight) == (6, 7, 7, 1)
    with pytest.raises(AssertionError):
        progress.commit(2)  # more than was scheduled


def test_no_more_is_scheduled_than_there_will_be():
    progress = Progress(num_prompt=3)
    with pytest.raises(AssertionError):
        progress.schedule(4, sampled=0)


def test_token_ids_of_any_part():
    request = Request.of(make([1, 2, 3], ()))
    request.progress.output_ids += [4, 5]
    everything = [1, 2, 3, 4, 5]
    for start in range(5):
        for end in range(start + 1, 6):
            assert request.token_ids(start, end - start) == everything[start:end]
    assert request.token_ids(5, 1) == [], "the host does not know it yet"
