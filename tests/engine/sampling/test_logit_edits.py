import pytest
import torch

from multilora.engine.sampling.logit_edits import LogitEdits, apply_penalties_and_bias, forbid_ends
from multilora.errors import BadRequest
from multilora.params import SamplingParams

CPU = torch.device("cpu")
VOCAB = 10


def edits(eos=(2, 8), prompt=(), **fields) -> LogitEdits | None:
    return LogitEdits.make(SamplingParams(**fields), prompt, eos, VOCAB, CPU)


def test_nothing_to_edit():
    assert edits(temperature=0.3, top_p=0.5, stop_token_ids=[4], ignore_eos=True) is None
    assert edits(logit_bias={}) is None


def test_bias_is_added_row_by_row():
    logits = torch.zeros(3, VOCAB)
    one, two = edits(logit_bias={"0": 1.5, "9": -3.0}), edits(logit_bias={"9": 2.0})
    apply_penalties_and_bias(logits, [(0, one, []), (2, two, [])])
    expected = torch.zeros(3, VOCAB)
    expected[0, 0], expected[0, 9], expected[2, 9] = 1.5, -3.0, 2.0
    assert logits.equal(expected)


def test_huge_bias_stays_finite():
    logits = torch.full((1, VOCAB), 50.0)
    apply_penalties_and_bias(logits, [(0, edits(logit_bias={"1": 1e308, "2": -1e308}), [])])
    assert logits.isfinite().all()
    assert (logits.argmax(), logits.argmin()) == (1, 2)


@pytest.mark.parametrize("token", ["10", "99999999999999999999"])
def test_bias_outside_the_vocabulary_is_refused_by_name(token):
    with pytest.raises(BadRequest, match=f"logit_bias: token id {token} is outside the vocabulary of 10") as error:
        edits(logit_bias={token: 1.0})
    assert error.value.param == "logit_bias"


def test_bias_comes_after_the_penalties():
    logits = torch.full((1, VOCAB), 4.0)
    edit = edits(logit_bias={"3": 1.0}, repetition_penalty=2.0, prompt=[3])
    apply_penalties_and_bias(logits, [(0, edit, [])])
    assert logits[0, 3] == 3.0


@pytest.mark.parametrize(
    ("fields", "ends"),
    [
        ({}, [2, 8]),
        ({"stop_token_ids": [5, 2, 77]}, [2, 5, 8]),
        ({"ignore_eos": True}, []),
        ({"ignore_eos": True, "stop_token_ids": [5]}, [5]),
    ],
    ids=str,
)
def test_ends_are_forbidden_before_min_new_tokens(fields, ends):
    edit = edits(min_new_tokens=3, **fields)
    assert edit.end_ids == ends
    assert [edit.must_go_on(i) for i in (0, 2, 3)] == [bool(ends), bool(ends), False]
    if ends:
        logits = torch.zeros(2, VOCAB)
        forbid_ends(logits, [(1, edit)])
        assert logits[0].eq(0).all()
        assert logits[1].isinf().nonzero()[:, 0].tolist() == ends
