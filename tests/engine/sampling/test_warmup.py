"""After the warmup no request makes a compiler run."""

import pytest
import torch

from multilora.engine.sampling.sampler import Sampler
from multilora.engine.sampling.state import SamplingState
from multilora.engine.sampling.warmup import warm_up
from multilora.params import SamplingParams

KINDS = [
    {"temperature": 0.0},
    {},
    {"top_k": 3, "presence_penalty": 0.5},
    {"top_p": 0.7, "min_p": 0.1},
    {"repetition_penalty": 1.1},
]


@pytest.mark.gpu
def test_nothing_is_compiled_for_other_numbers_of_rows_biases_and_alternatives():
    from triton import knobs

    vocab, device, found = 32_003, torch.device("cuda"), []
    warm_up(vocab, device)
    before, knobs.compilation.listener = knobs.compilation.listener, lambda **fact: found.append(fact)
    try:
        for rows in (1, 2, 3, 16, 33, 64):
            sampler = Sampler(vocab, device)
            for slot in range(rows):
                biases = {str(i): 1.0 for i in range(slot)}
                params = SamplingParams(**KINDS[slot % len(KINDS)], logit_bias=biases or None)
                state = SamplingState(
                    slot=slot, params=params, seed=slot, vocab_size=vocab, top_logprobs=slot % 21, prompt_ids=[1, 2],
                    processed=slot % 2 == 0,
                )  # fmt: skip
                sampler.install(state)
            for more in (0, 2, 29):  # tokens that an adapter adds
                sampler.sample(torch.randn(rows, vocab + more, device=device), range(rows), [0] * rows)
    finally:
        knobs.compilation.listener = before
    assert not found
