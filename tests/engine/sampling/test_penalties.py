import random

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from multilora.engine.sampling.penalties import PenaltyState, apply_penalties
from multilora.params import SamplingParams

CPU = torch.device("cpu")
PROMPT, OUTPUT = [3, 3, 5, 9], [5, 7, 7, 7, 1]


def penalised(logits: torch.Tensor, params: SamplingParams, prompt=PROMPT, output=OUTPUT) -> torch.Tensor:
    state = PenaltyState(params, prompt, CPU)
    state.update(output)
    logits = logits.clone()
    apply_penalties(logits, [0], [state])
    return logits


@pytest.mark.parametrize("penalty", [0.6, 1.3, 2.0])
def test_repetition_equals_transformers(penalty):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + OUTPUT]), logits)
    assert penalised(logits, SamplingParams(repetition_penalty=penalty)).equal(expected)


def test_frequency_and_presence_count_the_output_only():
    logits = torch.zeros(1, 10)
    frequency = penalised(logits, SamplingParams(frequency_penalty=0.5))
    assert frequency.tolist() == [[0, -0.5, 0, 0, 0, -0.5, 0, -1.5, 0, 0]]
    presence = penalised(logits, SamplingParams(presence_penalty=-2.0))
    assert presence.tolist() == [[0, 2, 0, 0, 0, 2, 0, 2, 0, 0]]


def test_all_three_in_order():
    logits = torch.full((1, 10), 4.0)
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0, presence_penalty=0.5)
    assert penalised(logits, params)[0, [0, 3, 5, 7]].tolist() == [4.0, 2.0, 0.5, -1.5]


def test_rows_with_different_penalties_do_not_mix():
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(repetition_penalty=1.5), SamplingParams(frequency_penalty=0.3)]
    states = [PenaltyState(params[0], PROMPT, CPU), PenaltyState(params[1], [2], CPU)]
    states[0].update(OUTPUT)
    changed = logits.clone()
    apply_penalties(changed, [3, 1], states)  # the second has no token yet
    assert changed[:3].equal(logits[:3])
    assert changed[3:].equal(penalised(logits[3:], params[0]))


def test_masked_logits_stay_masked():
    logits = torch.full((1, 10), float("-inf"))
    params = SamplingParams(repetition_penalty=0.5, frequency_penalty=-2.0, presence_penalty=-2.0)
    assert penalised(logits, params).equal(logits)


def test_growing_and_rolling_back_equals_starting_anew():
    rng = random.Random(0)
    params = SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1)
    state = PenaltyState(params, PROMPT, CPU)
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    output: list[int] = []
    for _ in range(300):  # each token comes from one draw, each draw begins with an update
        if rng.random() < 0.2:
            del output[len(output) - min(rng.randrange(6), len(output)) :]
        else:
            output.append(rng.randrange(20))
        if output and rng.random() < 0.1:
            output[-1] = rng.randrange(20)
        state.update(output)
        changed = logits.clone()
        apply_penalties(changed, [0], [state])
        assert changed.equal(penalised(logits, params, output=output))
    assert len(output) > 30


def test_update_costs_only_the_new_tokens(monkeypatch):
    state = PenaltyState(SamplingParams(frequency_penalty=1.0), [], CPU)
    state.update(list(range(50)) * 10)
    added: list[list[int]] = []
    monkeypatch.setattr(state, "_add", lambda ids, amount: added.append(ids))
    state.update([*list(range(50)) * 10, 8])
    assert added == [[], [8]]
