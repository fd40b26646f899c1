import pytest

from multilora.engine.scheduling.step_cost import LONGEST, StepCost


def observed(*steps: tuple[int, float]) -> StepCost:
    cost = StepCost()
    for prompt_tokens, seconds in steps:
        cost.observe(prompt_tokens, seconds)
    return cost


def test_nothing_is_known_at_first():
    assert (StepCost().fixed, StepCost().per_token, StepCost().decode) == (0, 0, 0)


def test_fixed_and_per_token_are_told_apart():
    cost = observed(*[(n, 0.010 + 0.00002 * n) for n in (128, 2048, 512, 256)])
    assert cost.fixed == pytest.approx(0.010)
    assert cost.per_token == pytest.approx(0.00002)


def test_steps_of_one_size_say_nothing_about_tokens():
    cost = observed((128, 0.012), (128, 0.014))
    assert cost.per_token == 0
    assert cost.fixed == pytest.approx(0.013, rel=0.01)


def test_decodes_are_counted_apart():
    cost = observed((0, 0.006), (128, 0.012), (0, 0.006))
    assert cost.decode == pytest.approx(0.006)
    assert cost.fixed == pytest.approx(0.012)


def test_old_steps_are_forgotten():
    cost = observed(*[(128, 0.100)] * 10, *[(128, 0.010)] * 100)
    assert cost.fixed == pytest.approx(0.010, rel=0.1)


def test_a_step_that_compiles_is_cut_off():
    assert observed((128, 60.0)).fixed == pytest.approx(LONGEST)


def test_longer_prompts_that_were_faster_give_no_negative_cost():
    cost = observed((128, 0.020), (512, 0.010))
    assert cost.per_token == 0
    assert cost.fixed == pytest.approx(0.015, rel=0.05)
