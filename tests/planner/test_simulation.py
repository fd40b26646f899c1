"""The scheduler of the planner, on a clock that a made-up cost moves."""

import pytest

from multilora.planner.simulation import (
    Adapters,
    Arrival,
    RequestDoesNotFitError,
    SimulatedLimits,
    Simulation,
    poisson,
    quantile_of,
)

ADAPTERS = Adapters((8,), nbytes=lambda rank: rank * 10, pages=lambda rank: rank // 4, copy_seconds=lambda _: 0.25)


def pages_for(tokens: int) -> int:
    return -(-tokens // 4)


LIMITS = SimulatedLimits(running=2, chunk_tokens=8, pages=100, pages_for=pages_for)


def run(arrivals, limits=LIMITS, adapters=ADAPTERS):
    simulation = Simulation(lambda _: 1.0, adapters, limits, keep=True)
    return simulation.run(arrivals)


def test_one_request_by_hand():
    found = run([Arrival(0.0, 12, 3, None)])
    assert [(s.decodes, s.prompt_tokens, s.context) for s in found.steps] == [
        (0, 8, 0),
        (0, 4, 0),
        (1, 0, 13),
        (1, 0, 14),
    ]
    assert [s.prompt_context for s in found.steps] == [32, 4 * 8 + 8, 0, 0]
    assert found.first == [2.0] and found.seconds == 4.0 and found.tokens == 3
    assert found.tokens_per_second == 0.75 and found.first_token(0.99) == 2.0


def test_slots_and_the_budget_of_prompt_tokens():
    found = run([Arrival(0.0, 6, 2, None)] * 3)
    assert [(s.decodes, s.prompt_tokens) for s in found.steps] == [(0, 8), (1, 4), (1, 6), (1, 0)]
    assert found.widest == 2
    assert found.tokens == 6


def test_an_adapter_is_waited_for_once_and_counted_once():
    found = run([Arrival(0.0, 4, 2, 0), Arrival(0.0, 4, 2, 0)])
    assert found.loads == 1 and found.first == [1.25, 1.25]
    assert [(s.adapter_bytes, s.adapted_tokens, s.adapted_prompt_ranks) for s in found.steps] == [
        (80, 8, 64),
        (80, 2, 0),
    ]


def test_adapters_take_turns_where_there_is_room_for_one():
    limits = SimulatedLimits(running=4, chunk_tokens=64, pages=100, pages_for=pages_for, adapter_pages=2)
    found = run([Arrival(0.0, 4, 2, i % 2) for i in range(4)], limits)
    assert found.loads == 2  # requests of one adapter follow each other
    assert found.widest == 2
    roomy = run([Arrival(0.0, 4, 2, i % 2) for i in range(4)], SimulatedLimits(4, 64, 100, pages_for))
    assert roomy.loads == 2 and roomy.seconds < found.seconds


def test_pages_bound_requests_and_idle_adapters_give_way():
    limits = SimulatedLimits(running=4, chunk_tokens=64, pages=5, pages_for=pages_for)
    found = run([Arrival(0.0, 4, 4, None)] * 4, limits)
    assert found.widest == 2  # two pages each
    found = run([Arrival(0.0, 4, 4, 0), Arrival(9.0, 8, 8, None)], limits)
    assert found.loads == 1 and found.tokens == 12
    with pytest.raises(RequestDoesNotFitError):
        run([Arrival(0.0, 20, 4, None)], limits)
    with pytest.raises(RequestDoesNotFitError):
        run([Arrival(0.0, 12, 4, 0)], limits)


def test_who_comes_during_a_step_waits_for_the_one_that_is_planned():
    found = run([Arrival(0.0, 4, 5, None), Arrival(0.5, 4, 1, None)])
    assert found.first == [1.0, 2.5]
    assert run([Arrival(7.0, 4, 1, None)]).first == [1.0]


def test_poisson():
    found = poisson(10.0, 2000, 5, 6, 4, skew=1.0)
    assert found == poisson(10.0, 2000, 5, 6, 4, skew=1.0)
    assert found[-1].at == pytest.approx(200, rel=0.1)
    counts = [sum(a.adapter == i for a in found) for i in range(4)]
    assert counts == sorted(counts, reverse=True) and counts[0] == pytest.approx(2000 * 12 / 25, rel=0.1)
    assert {a.adapter for a in poisson(1.0, 5, 1, 1, 0)} == {None}


def test_quantiles():
    assert quantile_of([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile_of([3.0, 1.0, 2.0], 0.99) == 3.0
    assert quantile_of([], 0.5) == 0.0
