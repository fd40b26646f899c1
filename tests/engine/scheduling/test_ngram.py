"""Covers `scheduling/drafters.py` too."""

import random
import time

import pytest

from multilora.config import Config
from multilora.engine.messages import Submit
from multilora.engine.scheduling.drafters import DRAFTERS
from multilora.engine.scheduling.ngram import CHAIN, NgramDrafter
from multilora.engine.scheduling.request import RequestSpec
from multilora.params import SamplingParams


def told(tokens: list[int], smallest: int = 2, largest: int = 4) -> NgramDrafter:
    drafter = NgramDrafter(smallest, largest, most_tokens=1000)
    drafter.extend(tokens)
    return drafter


def looked_up(tokens: list[int], count: int, smallest: int, largest: int) -> list[int]:
    """The specification: of all earlier places the longest match, of equals the latest."""
    best, longest = None, smallest - 1
    for end in range(len(tokens) - 1, smallest - 1, -1):
        length = 0
        while length < min(largest, end) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length > longest:
            best, longest = end, length
    draft: list[int] = []
    if best is not None:
        for i in range(best, best + count):
            draft.append((tokens + draft)[i])
    return draft


def test_what_followed_before_is_drafted():
    assert told([1, 2, 3, 4, 5, 9, 1, 2]).propose(3) == [3, 4, 5]


def test_the_longest_match_wins_and_the_latest_of_equals():
    assert told([7, 1, 2, 5, 0, 1, 2, 6, 0, 8, 7, 1, 2]).propose(1) == [5]
    assert told([1, 2, 5, 0, 1, 2, 6, 0, 1, 2]).propose(1) == [6]


def test_a_match_up_to_the_end_goes_round():
    assert told([1, 2, 3, 1, 2]).propose(7) == [3, 1, 2, 3, 1, 2, 3]
    assert told([5, 5, 5]).propose(4) == [5, 5, 5, 5]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 1]])
def test_nothing_is_drafted_without_a_match(tokens):
    assert told(tokens).propose(4) == []


@pytest.mark.parametrize("seed", range(30))
def test_as_specified_however_the_tokens_come(seed):
    """Few occurrences of each window, so that none is beyond the chain."""
    rng = random.Random(seed)
    smallest = rng.choice([1, 2, 3])
    largest = smallest + rng.choice([0, 1, 5])
    drafter = NgramDrafter(smallest, largest, most_tokens=100)
    tokens: list[int] = []
    while len(tokens) < CHAIN:
        more = [rng.randrange(4) for _ in range(rng.choice([0, 1, 1, 2, 5]))]
        drafter.extend(more)
        tokens += more
        assert drafter.known == len(tokens)
        assert drafter.propose(6) == looked_up(tokens, 6, smallest, largest)


def test_a_token_costs_the_same_at_the_end_of_a_long_text():
    """Even if every window is the same one."""

    def seconds(length: int) -> float:
        drafter = told([3] * length)
        drafter.propose(8)
        best = float("inf")
        for _ in range(5):
            start = time.process_time()
            for _ in range(300):
                drafter.extend([3])
                drafter.propose(8)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(100_000) < 10 * seconds(1_000)


def test_the_configured_windows():
    config = Config(speculative_ngram_min_match_window_size=3, speculative_ngram_max_match_window_size=3)
    message = Submit(rid="r", input_ids=[1, 2, 3, 4, 1, 2], sampling=SamplingParams(max_new_tokens=5))
    spec = RequestSpec.of(message, None, seed=0, order=0, arrival=0.0, vocab_size=9)
    drafter = DRAFTERS["ngram"](config)(spec)
    drafter.extend(message.input_ids)
    assert drafter.propose(2) == []
    drafter.extend([3])
    assert drafter.propose(2) == [4, 1]
