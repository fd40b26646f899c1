import math

import pytest
import torch

from multilora.engine.messages import Logprobs
from multilora.engine.sampling import logprobs
from multilora.engine.sampling.logprobs import token_logprobs


def test_equal_log_softmax():
    logits = torch.randn(7, 101, generator=torch.Generator().manual_seed(0)) * 4
    ids = torch.arange(7) * 13
    values = token_logprobs(logits, ids, 4).to_host()
    tokens, tops = [v.logprob for v in values], [v.top for v in values]
    reference = logits.double().log_softmax(-1)
    assert tokens == pytest.approx(reference.gather(1, ids[:, None])[:, 0].tolist(), abs=1e-5)
    best, order = reference.topk(4)
    assert [[i for _, i in top] for top in tops] == order.tolist()
    assert [v for top in tops for v, _ in top] == pytest.approx(best.flatten().tolist(), abs=1e-5)


def test_ties_go_to_the_lowest_id_whatever_k():
    logits = torch.tensor([[-1.0, 0.0, -0.0, 0.0, -5.0, 0.0, -1.0]])
    for k in range(8):
        (value,) = token_logprobs(logits, torch.tensor([0]), k).to_host()
        assert [i for _, i in value.top] == [1, 2, 3, 5, 0, 6, 4][:k]


def test_the_rank_is_the_place_in_the_order_of_the_best():
    logits = torch.tensor([[-1.0, 0.0, -0.0, 0.0, -5.0, 0.0, -1.0], [3.0, 1.0, 2.0, 0.0, 7.0, -9.0, -math.inf]])
    for token in range(7):
        found = token_logprobs(logits, torch.tensor([token, token]), 7, ranks=True).to_host()
        assert found[0].rank == [5, 1, 2, 3, 7, 4, 6][token]
        assert found[1].rank == [2, 4, 3, 5, 1, 6, 7][token]
    assert [one.rank for one in token_logprobs(logits, torch.tensor([1, 1]), 7).to_host()] == [None, None]


def test_padding_and_nan_never_travel():
    logits = torch.tensor([[1.0, 2.0, float("-inf")], [float("nan"), 0.0, 0.0]])
    padded, broken = token_logprobs(logits, torch.tensor([2, 1]), 3).to_host()
    assert padded.logprob is None
    assert [i for _, i in padded.top] == [1, 0]
    assert broken == Logprobs(None, [])


def test_passes_do_not_show(monkeypatch):
    logits = torch.randn(10, 33, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(10)
    whole = token_logprobs(logits, ids, 2, ranks=True)
    monkeypatch.setitem(logprobs._PASS_ELEMENTS, "cpu", 100)
    parts = token_logprobs(logits, ids, 2, ranks=True)
    assert parts.ranks.equal(whole.ranks)
    assert parts.tokens.equal(whole.tokens)
    assert parts.top_ids.equal(whole.top_ids)
    assert parts.top_values.equal(whole.top_values)


def test_more_than_the_vocabulary_and_no_rows_and_bf16():
    (value,) = token_logprobs(torch.zeros(1, 3, dtype=torch.bfloat16), torch.tensor([0]), 5).to_host()
    assert value.top == [(pytest.approx(-math.log(3)), i) for i in range(3)]
    assert token_logprobs(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 2).to_host() == []
