"""Logprobs of what a token is drawn from, against transformers' logits processors, row by row in one batch."""

import numpy as np
import pytest
import torch
from sampling_rows import Row, row, sample
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from multilora.engine.sampling.sampler import Sampler

VOCAB = 503
PROMPT, OUTPUT = (3, 5, 8), (5, 13, 13)
CASES = [
    {},
    {"temperature": 0.6},
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"top_k": 9},
    {"top_k": 1},
    {"top_p": 0.6},
    {"min_p": 0.05},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.8, "repetition_penalty": 1.3, "top_p": 0.8},
    {"frequency_penalty": 0.7, "presence_penalty": -0.4, "temperature": 1.2},
    {"logit_bias": {"7": 4.0, "13": -2.0}, "top_k": 5},
]


@pytest.fixture
def sampler() -> Sampler:
    return Sampler(VOCAB, torch.device("cpu"), [2])


def logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


def asked(fields, **own) -> Row:
    return row(prompt=PROMPT, output=OUTPUT, top_logprobs=4, ranks=True, **own, **fields)


def reference(raw: torch.Tensor, fields) -> torch.Tensor:
    """fp64 [vocab]: the log-softmax of what the row is drawn from. Top-k, top-p and min-p each judge the tempered
    distribution; a token stays if all three keep it."""
    ids = torch.tensor([[*PROMPT, *OUTPUT]])
    x = raw[None].double()
    if "repetition_penalty" in fields:
        x = RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"])(ids, x)
    for token in set(OUTPUT):
        x[0, token] -= OUTPUT.count(token) * fields.get("frequency_penalty", 0) + fields.get("presence_penalty", 0)
    for token, bias in fields.get("logit_bias", {}).items():
        x[0, int(token)] += bias
    temperature = fields.get("temperature", 1.0)
    if temperature == 0:
        return x[0].log_softmax(-1)
    x = LogitsProcessorList([TemperatureLogitsWarper(temperature)])(ids, x)
    kept = torch.ones_like(x, dtype=torch.bool)
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in fields:
            kept &= warper(fields[name])(ids, x.clone()).isfinite()
    return x.masked_fill(~kept, -torch.inf)[0].log_softmax(-1)


def test_processed_logprobs_are_those_of_what_the_token_is_drawn_from(sampler):
    x = logits(len(CASES))
    found = sample(sampler, x, [asked(fields, processed=True, seed=i) for i, fields in enumerate(CASES)])
    for i, fields in enumerate(CASES):
        want, one = reference(x[i], fields), found.logprobs[i]
        assert one.logprob == pytest.approx(want[found.token_ids[i]].item(), abs=2e-6), fields
        best = want.sort(descending=True, stable=True)
        top = [(v, t) for v, t in zip(best.values[:4].tolist(), best.indices[:4].tolist(), strict=True) if v > -1e9]
        assert [t for _, t in one.top] == [t for _, t in top], fields
        assert [v for v, _ in one.top] == pytest.approx([v for v, _ in top], abs=2e-6)
        assert one.rank == best.indices.tolist().index(found.token_ids[i]) + 1


def test_tokens_are_the_same_in_both_modes_and_raw_rows_keep_raw_logprobs(sampler):
    x = logits(len(CASES))
    raw = sample(sampler, x, [asked(fields, seed=i) for i, fields in enumerate(CASES)])
    mixed = sample(sampler, x, [asked(fields, seed=i, processed=i % 2 == 0) for i, fields in enumerate(CASES)])
    assert mixed.token_ids == raw.token_ids
    assert mixed.logprobs[1::2] == raw.logprobs[1::2]
    for i, token in enumerate(raw.token_ids):
        assert raw.logprobs[i].logprob == pytest.approx(x[i].log_softmax(-1)[token].item(), abs=2e-6)
    assert mixed.logprobs[4] != raw.logprobs[4]


def test_the_only_token_that_is_left_has_all_of_the_probability(sampler):
    found = sample(sampler, logits(2), [asked({"top_k": 1}, processed=True), asked({"top_p": 1e-6}, processed=True)])
    assert [one.logprob for one in found.logprobs] == [0.0, 0.0]
    assert [len(one.top) for one in found.logprobs] == [1, 1]


def test_a_mode_without_logprobs_asks_for_nothing(sampler):
    found = sample(sampler, logits(1), [row(processed=True, top_k=3)])
    assert found.logprobs == [None]
    row(processed=True).install(sampler, 0)
    batch = sampler._table.batch(np.zeros(1, np.int32), np.zeros(1, np.int32))
    assert not batch.processes
