import random
from typing import Any

import pytest
import torch
from sampling_rows import Row, row, sample
from transformers import RepetitionPenaltyLogitsProcessor

from multilora.engine.sampling.batch import Column, SlotTable
from multilora.engine.sampling.edits import EditTables, RowPool, check_bias, count, edited
from multilora.engine.sampling.sampler import Sampler
from multilora.engine.sampling.state import SamplingState
from multilora.errors import BadRequest
from multilora.params import SamplingParams

CPU = torch.device("cpu")
VOCAB = 12
PROMPT, OUTPUT = [3, 3, 5, 9], [5, 7, 7, 7, 1]


class Rows:
    """Requests with edits, one per slot, and their tables."""

    def __init__(self) -> None:
        self.tables, self.table, self.held = EditTables(CPU), SlotTable(), {}

    def add(self, slot: int, prompt=PROMPT, output=OUTPUT, ends=(2, 8), vocab_size=VOCAB, **fields: Any) -> "Rows":
        params = SamplingParams(**fields)
        state = SamplingState(
            slot=slot, params=params, seed=0, prompt_ids=prompt, end_ids=ends, vocab_size=vocab_size
        )
        counts = self.tables.add_counts(state)
        bias, biased, end_entries = self.tables.add_bias(state)
        self.table.set(state, counts, bias, (biased, end_entries))
        self.held[slot] = counts, bias
        for token in output:
            self.count([slot], [token])
        return self

    def count(self, slots: list[int], tokens: list[int]) -> None:
        count(torch.tensor(tokens), self.numbers(slots), self.tables)

    def numbers(self, slots: list[int], position: int = 0):
        return self.table.batch(
            torch.tensor(slots).int().numpy(), torch.full((len(slots),), position).int().numpy()
        ).numbers

    def edit(self, logits: torch.Tensor, slots: list[int], position: int = 0) -> torch.Tensor:
        return edited(logits, self.numbers(slots, position), self.tables, None, VOCAB)


def penalised(logits: torch.Tensor, prompt=PROMPT, output=OUTPUT, **fields: Any) -> torch.Tensor:
    return Rows().add(0, prompt, output, **fields).edit(logits, [0])


@pytest.mark.parametrize("penalty", [0.6, 1.3, 2.0])
def test_repetition_equals_transformers(penalty):
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([PROMPT + OUTPUT]), logits)
    assert penalised(logits, repetition_penalty=penalty).equal(expected)


def test_frequency_and_presence_count_the_output_only():
    logits = torch.zeros(1, 10)
    assert penalised(logits, frequency_penalty=0.5).tolist() == [[0, -0.5, 0, 0, 0, -0.5, 0, -1.5, 0, 0]]
    assert penalised(logits, presence_penalty=-2.0).tolist() == [[0, 2, 0, 0, 0, 2, 0, 2, 0, 0]]


def test_all_three_in_order():
    fields = {"repetition_penalty": 2.0, "frequency_penalty": 1.0, "presence_penalty": 0.5}
    changed = penalised(torch.full((1, 10), 4.0), **fields)
    assert changed[0, [0, 3, 5, 7]].tolist() == [4.0, 2.0, 0.5, -1.5]


def test_rows_with_different_penalties_do_not_mix():
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    rows = Rows().add(7, repetition_penalty=1.5).add(2, output=[], frequency_penalty=0.3).add(0).add(1)
    changed = rows.edit(logits, [0, 2, 1, 7])
    assert changed[:3].equal(logits[:3])
    assert changed[3:].equal(penalised(logits[3:], repetition_penalty=1.5))


def test_masked_logits_stay_masked():
    logits = torch.full((1, 10), float("-inf"))
    fields = {"repetition_penalty": 0.5, "frequency_penalty": -2.0, "presence_penalty": -2.0}
    assert penalised(logits, **fields).equal(logits)


def test_counting_step_by_step_among_others_that_come_and_go():
    """What one request's counts are does not depend on the rows beside it, on rows used before, nor on growth."""
    rng = random.Random(0)
    fields = {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.1}
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    rows, outputs = Rows(), {}
    for _ in range(120):
        slot = rng.randrange(6)
        if slot in outputs and rng.random() < 0.2:
            del outputs[slot]
            rows.tables.free(*rows.held.pop(slot))
            rows.table.clear(slot)
        elif slot not in outputs:
            outputs[slot] = []
            rows.add(slot, output=[], vocab_size=rng.choice([12, 20]), **fields)
        slots = sorted(outputs)
        tokens = [rng.randrange(12) for _ in slots]
        rows.count(slots, tokens)
        for some, token in zip(slots, tokens, strict=True):
            outputs[some].append(token)
            assert rows.edit(logits, [some]).equal(penalised(logits, output=outputs[some], **fields))
    assert rows.tables.counts.shape[0] <= 8  # 6 requests at most, and the row that is nobody's


def test_freed_rows_are_taken_again_before_the_table_grows():
    pool = RowPool()
    rows = [pool.take() for _ in range(5)]
    assert sorted(rows) == [1, 2, 3, 4, 5]
    assert pool.size == 8
    for used in rows:
        pool.give_back(used)
    assert {pool.take() for _ in range(7)} == set(range(1, 8))
    assert pool.size == 8


def test_bias_is_added_row_by_row_and_huge_ones_stay_finite():
    logits = torch.zeros(3, VOCAB)
    rows = Rows().add(4, logit_bias={"0": 1.5, "9": -3.0}).add(5).add(6, logit_bias={"9": 2.0})
    expected = torch.zeros(3, VOCAB)
    expected[0, 0], expected[0, 9], expected[2, 9] = 1.5, -3.0, 2.0
    assert rows.edit(logits, [4, 5, 6]).equal(expected)
    logits = rows.add(4, logit_bias={"1": 1e308, "2": -1e308}).edit(torch.full((1, VOCAB), 50.0), [4])
    assert logits.isfinite().all()
    assert (logits.argmax(), logits.argmin()) == (1, 2)


@pytest.mark.parametrize("token", ["10", "99999999999999999999"])
def test_bias_outside_the_vocabulary_is_refused_by_name(token):
    with pytest.raises(BadRequest, match=f"logit_bias: token id {token} is outside the vocabulary of 10") as error:
        check_bias(SamplingParams(logit_bias={token: 1.0}), 10)
    assert error.value.param == "logit_bias"
    check_bias(SamplingParams(logit_bias={"9": 1.0}), 10)


def test_bias_comes_after_the_penalties():
    rows = Rows().add(0, [3], [], logit_bias={"3": 1.0}, repetition_penalty=2.0)
    assert rows.edit(torch.full((1, VOCAB), 4.0), [0])[0, 3] == 3.0


@pytest.mark.parametrize("ends", [(), (2, 8), (5, 2, 77, 5)])
def test_ends_are_forbidden_before_min_new_tokens(ends):
    rows = Rows().add(0, ends=ends, min_new_tokens=3, logit_bias={"2": 5.0}).add(1)
    forbidden = sorted({t for t in ends if t < VOCAB})
    for position in (0, 2, 3):
        logits = rows.edit(torch.zeros(2, VOCAB), [1, 0], position)
        assert logits[0].eq(0).all()
        assert logits[1].isinf().nonzero()[:, 0].tolist() == (forbidden if position < 3 else [])
        assert logits[1, 2] == (5.0 if 2 not in forbidden or position == 3 else float("-inf"))


def test_a_request_without_edits_takes_no_row():
    rows = Rows().add(0, temperature=0.3, top_p=0.5, stop_token_ids=[4], logit_bias={})
    assert rows.held == {0: (0, 0)}
    assert not rows.numbers([0])[[Column.COUNTS, Column.BIAS, Column.BIASED]].any()


def test_an_adapter_with_more_tokens_than_the_base_model():
    """Its row counts and biases what others do not have; their rows stay as wide as the logits are."""
    sampler = Sampler(VOCAB, CPU)
    longer: list[Row] = [
        row(vocab_size=20, output=(15,), temperature=0.0, repetition_penalty=1.5),
        row(vocab_size=20, temperature=0.0, logit_bias={"19": 9.0}),
        row(output=(3,), temperature=0.0, presence_penalty=2.0),
    ]
    logits = torch.zeros(3, 20)
    logits[:2, [15, 16]] = torch.tensor([1.2, 1.0])
    logits[2, [3, 4]] = torch.tensor([1.2, 1.0])
    assert sample(sampler, logits, longer).token_ids == [16, 19, 4]
    assert sample(sampler, logits[2:, :VOCAB], longer[2:]).token_ids == [4]
