import pytest

from multilora.engine.scheduling.verify_cost import ENOUGH, VerifyCost


def observed(*steps: tuple[int, float]) -> VerifyCost:
    cost = VerifyCost()
    for drafted, seconds in steps:
        cost.observe(drafted, seconds)
    return cost


def test_nothing_is_known_before_some_plain_steps():
    assert not VerifyCost().known
    assert not observed(*[(8, 0.01)] * 20, *[(0, 0.01)] * (ENOUGH - 1)).known
    assert observed(*[(0, 0.01)] * ENOUGH).known


def test_drafts_cost_nothing_until_some_were_verified():
    cost = observed(*[(0, 0.010)] * 3, (8, 0.5), (8, 0.5))
    assert (cost.plain, cost.fixed, cost.per_token) == (0.010, 0, 0)


def test_fixed_and_per_token_are_told_apart():
    cost = observed(*[(0, 0.010)] * 3, *[(n, 0.012 + 0.0005 * n) for n in (8, 2, 5, 8, 16)])
    assert cost.fixed == pytest.approx(0.002)
    assert cost.per_token == pytest.approx(0.0005)


def test_steps_of_one_number_of_tokens_do_not_tell_what_a_token_costs():
    cost = observed(*[(0, 0.010)] * 3, *[(8, 0.012)] * 3)
    assert (cost.fixed, cost.per_token) == (pytest.approx(0), pytest.approx(0.002 / 8))
    cost.observe(4, 0.012)
    assert (cost.fixed, cost.per_token) == (pytest.approx(0.002), 0)
    for _ in range(20):
        cost.observe(4, 0.013)
    assert (cost.fixed, cost.per_token) == (pytest.approx(0.003), 0)


def test_one_step_that_compiles_does_not_count():
    cost = observed(*[(0, 0.010)] * 4, (0, 9.0), *[(n, 0.012 + 0.0005 * n) for n in (8, 2, 5, 16)], (4, 9.0))
    assert cost.plain == 0.010
    assert cost.fixed == pytest.approx(0.002, abs=0.001)


def test_the_latest_steps_count():
    cost = observed(*[(0, 0.010)] * 20, *[(0, 0.030)] * 5)
    assert cost.plain == 0.030


def test_a_verification_that_was_faster_costs_nothing():
    cost = observed(*[(0, 0.010)] * 3, *[(8, 0.008), (4, 0.009), (2, 0.0095)])
    assert (cost.fixed, cost.per_token) == (0, 0)
