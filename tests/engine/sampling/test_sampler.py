"""Covers `sampling/state.py`."""

import math

import pytest
import torch
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import Row, row, sample

from multilora.engine.faults import NONE_ALLOWED, NOT_FINITE
from multilora.engine.sampling import sampler as sampler_module
from multilora.engine.sampling.sampler import Sampled, Sampler
from multilora.engine.sampling.state import SamplingState
from multilora.errors import BadRequest
from multilora.params import SamplingParams

CPU = torch.device("cpu")
VOCAB = 1003  # odd, so that no vector width divides it
EOS = 2
INFO = xgrammar.TokenizerInfo([bytes([i]) for i in range(256)], vocab_size=VOCAB, stop_token_ids=[EOS])
DIGITS = xgrammar.Grammar.from_regex("[0-9]{3}").serialize_json()
MANY_DIGITS = xgrammar.Grammar.from_regex("[0-9]+").serialize_json()
VARIETY = [
    {"temperature": 0.0},
    {},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.02},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 0.0, "repetition_penalty": 1.9},
    {"top_k": 1},
    {"frequency_penalty": 1.0, "presence_penalty": -0.5},
    {"logit_bias": {"5": 3.0, "900": 8.0}},
    {"min_new_tokens": 9, "top_p": 0.5},
]


def make_sampler() -> Sampler:
    sampler = Sampler(VOCAB, CPU, [EOS])
    sampler.use_tokenizer(INFO.serialize_json())
    return sampler


@pytest.fixture
def sampler() -> Sampler:
    return make_sampler()


def logits(rows: int, seed=0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def variety(n: int) -> list[Row]:
    return [
        row(
            position=i,
            seed=i // 2,
            output=(3, i, i),
            prompt=(1, 2),
            ends=(EOS,),
            top_logprobs=i % 4 - 1,
            **VARIETY[i % len(VARIETY)],
        )
        for i in range(n)
    ]


def test_a_row_never_depends_on_its_neighbours(sampler):
    n = 44
    x = logits(n)
    together = sample(sampler, x, variety(n))
    for i in range(n):
        alone = sample(sampler, x[i : i + 1], [variety(n)[i]])
        assert alone.token_ids[0] == together.token_ids[i]
        assert alone.logprobs[0] == together.logprobs[i]
    backwards = sample(sampler, x.flip(0), variety(n)[::-1])
    assert backwards.token_ids == together.token_ids[::-1]
    assert len(set(together.token_ids)) > n // 2


def test_the_same_seed_and_position_draw_the_same_token_and_others_do_not(sampler):
    x = logits(1).div(3).repeat(60, 1)
    drawn = sample(sampler, x, [row(seed=i % 2, position=i // 4) for i in range(60)]).token_ids
    assert drawn[0::4] == drawn[2::4]
    assert drawn[1::4] == drawn[3::4]
    assert drawn[0::4] != drawn[1::4]
    assert len(set(drawn[0::4])) > 5


def test_the_logits_are_left_as_they_are(sampler):
    x = logits(len(VARIETY))
    before = x.clone()
    sample(sampler, x, variety(len(VARIETY)))
    assert x.equal(before)


def test_a_greedy_batch_is_the_argmax_with_the_lowest_id_among_equals(sampler):
    x = logits(3)
    x[1, [800, 17, 400]] = 50.0
    result = sample(sampler, x, [row(temperature=0.0)] * 3)
    assert result == Sampled([x[0].argmax(), 17, x[2].argmax()], [None] * 3, [None] * 3)
    drawn = sample(sampler, x[[1]].repeat(2, 1), [row(top_k=1), row(temperature=0.0)])
    assert drawn.token_ids == [17, 17]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    output=st.lists(st.integers(0, 30), max_size=12),
    bias=st.dictionaries(st.integers(0, 30).map(str), st.floats(-9, 9), max_size=5),
    repetition=st.sampled_from([1.0, 0.7, 1.8]),
    frequency=st.sampled_from([0.0, 1.5]),
    minimum=st.integers(0, 12),
)
def test_greedy_is_the_argmax_after_all_edits(seed, output, bias, repetition, frequency, minimum):
    x = logits(1, seed)
    x[0, 30:] -= 5  # so that edits matter
    expected = x[0].double()
    for token in {4, 5, *output}:
        expected[token] = expected[token] * repetition if expected[token] < 0 else expected[token] / repetition
    for token in output:
        expected[token] -= frequency
    for token, value in bias.items():
        expected[int(token)] += value
    if len(output) < minimum:
        expected[[EOS, 11]] = -math.inf
    fields = {"repetition_penalty": repetition, "frequency_penalty": frequency, "logit_bias": bias}
    fields["min_new_tokens"] = minimum
    result = sample(
        make_sampler(), x, [row(output=tuple(output), prompt=(4, 5), ends=(EOS, 11), temperature=0.0, **fields)]
    )
    assert result.token_ids == [expected.argmax()]


def test_edits_act_before_random_draws_too(sampler):
    x = torch.zeros(200, VOCAB)
    x[:, [EOS, 7]] = 30.0
    rows = [row(seed=i, ends=(EOS,), min_new_tokens=1, top_p=0.9 if i % 2 else 1.0) for i in range(200)]
    assert set(sample(sampler, x, rows).token_ids) == {7}
    rows = [row(seed=i, position=1, ends=(EOS,), min_new_tokens=1) for i in range(200)]
    assert set(sample(sampler, x, rows).token_ids) == {EOS, 7}


def test_logprobs_are_raw(sampler):
    x = logits(4)
    rows = [
        row(temperature=0.0, logit_bias={"77": 100.0}, top_logprobs=0),
        row(temperature=0.0),
        row(temperature=0.2, seed=3, top_k=5, top_logprobs=2),
        row(temperature=5.0, seed=4, repetition_penalty=1.5, prompt=(1, 2, 3), top_logprobs=1),
    ]
    result = sample(sampler, x, rows)
    assert result.token_ids[0] == 77
    reference = x.double().log_softmax(-1)
    for i in (0, 2, 3):
        assert result.logprobs[i].logprob == pytest.approx(reference[i, result.token_ids[i]].item(), abs=1e-5)
    assert result.logprobs[1] is None
    assert [None if value is None else len(value.top) for value in result.logprobs] == [0, None, 2, 1]
    assert [token for _, token in result.logprobs[2].top] == reference[2].topk(2).indices.tolist()


@pytest.mark.parametrize("fields", VARIETY, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_an_error_of_their_row(sampler, fields, value):
    x = logits(3)
    intact = sample(sampler, x, [row(seed=1, **fields)] * 3)
    x[1, 500] = value
    result = sample(sampler, x, [row(seed=1, **fields)] * 3)
    assert result.errors == [None, NOT_FINITE, None]
    assert result.token_ids[::2] == intact.token_ids[::2]
    assert 0 <= result.token_ids[1] < VOCAB


def test_nan_hides_behind_no_mask(sampler):
    x = logits(1)
    x[0, 500] = math.nan  # no digit
    assert sample(sampler, x, [row(grammar=DIGITS)]).errors == [NOT_FINITE]


def test_padded_vocabulary_is_never_drawn(sampler):
    x = torch.zeros(300, VOCAB)
    x[:, 10:] = -math.inf
    result = sample(sampler, x, [row(seed=i, **VARIETY[1 + i % 5]) for i in range(300)])
    assert set(result.token_ids) <= set(range(10))
    assert result.errors == [None] * 300


def test_nothing_allowed_is_an_error_of_its_row(sampler):
    x = torch.full((2, VOCAB), -math.inf)
    x[:, EOS] = 1.0
    result = sample(sampler, x, [row(ends=(EOS,), min_new_tokens=1), row(seed=1)])
    assert result.errors == [NONE_ALLOWED, None]


# ---------------------------------------------------------------------- what slots hold from step to step


def install(sampler: Sampler, slot: int, **fields) -> None:
    own = {name: fields.pop(name) for name in ("prompt_ids", "end_ids", "grammar", "seed") if name in fields}
    seed = own.pop("seed", 5)
    sampler.install(SamplingState(slot=slot, params=SamplingParams(**fields), seed=seed, vocab_size=VOCAB, **own))


def step(sampler: Sampler, x: torch.Tensor, slots: list[int], position: int) -> Sampled:
    return sampler.read(sampler.sample(x, slots, [position] * len(slots)).to_cpu())


def test_penalties_count_what_was_sampled_before_the_host_has_read_it(sampler):
    """Steps are launched one after the other; the first is read when all have been."""
    x = torch.zeros(2, VOCAB)
    x[:, :6] = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    install(sampler, 0, temperature=0.0, presence_penalty=2.0, frequency_penalty=1.0)
    install(sampler, 3, temperature=0.0)
    launched = [sampler.sample(x, [3, 0], [i, i]) for i in range(6)]
    assert not sampler.needs_tokens([3, 0])
    read = [sampler.read(some.to_cpu()).token_ids for some in launched]
    assert [tokens[0] for tokens in read] == [0] * 6
    expected, counts = [], [0] * 6
    for _ in range(6):
        best = max(range(6), key=lambda t: (6 - t - counts[t] - 2 * (counts[t] > 0), -t))
        counts[best] += 1
        expected.append(best)
    assert [tokens[1] for tokens in read] == expected


def test_a_slot_keeps_nothing_of_an_earlier_request(sampler):
    x = torch.zeros(1, VOCAB)
    x[0, 7] = 1.0
    edits = {"repetition_penalty": 2.0, "presence_penalty": 2.0, "prompt_ids": [7], "logit_bias": {"9": 50.0}}
    install(sampler, 0, temperature=0.0, **edits)
    assert step(sampler, x, [0], 0).token_ids == [9]
    sampler.free(0)
    assert step(sampler, x, [0], 1).token_ids == [7]  # a row that was in flight when its request ended
    for _ in range(2):  # also if it was not freed before
        install(sampler, 0, temperature=0.0, presence_penalty=0.5)
        assert step(sampler, x, [0], 0).token_ids == [7]


def test_grammar_rows_among_others(sampler):
    x = logits(3)
    install(sampler, 0, temperature=0.0)
    install(sampler, 1, grammar=DIGITS, min_new_tokens=50, end_ids=(EOS,))
    install(sampler, 2, seed=9)
    assert sampler.needs_tokens([0, 1, 2])
    assert not sampler.needs_tokens([0, 2])
    results = [step(sampler, x, [0, 1, 2], i) for i in range(4)]
    assert all(result.errors == [None] * 3 for result in results)
    output = [result.token_ids[1] for result in results]
    assert bytes(output[:3]).isdigit()
    assert output[3] == EOS
    sampler.free(1)
    assert not sampler.needs_tokens([0, 1, 2])
    assert [step(sampler, x, [0, 1, 2], i).token_ids[::2] for i in range(4)] == [r.token_ids[::2] for r in results]


def test_a_token_that_ends_the_answer_does_not_move_its_grammar(sampler):
    """With ignore_eos EOS is no such token: after it, only EOS may follow."""
    x = torch.zeros(2, VOCAB)
    x[:, EOS] = 50.0
    install(sampler, 0, temperature=0.0, grammar=MANY_DIGITS, end_ids=(EOS,))
    install(sampler, 1, temperature=0.0, grammar=MANY_DIGITS)
    digit = x.clone()
    digit[:, ord("4")] = 99.0
    assert step(sampler, digit, [0, 1], 0).token_ids == [ord("4")] * 2
    assert step(sampler, x, [0, 1], 1).token_ids == [EOS] * 2
    after = step(sampler, digit, [0, 1], 2)  # the first row is one in flight for an answer that has ended
    assert after == Sampled([ord("4"), EOS], [None] * 2, [None] * 2)


def test_min_new_tokens_holds_under_a_grammar_that_may_end(sampler):
    x = torch.zeros(1, VOCAB)
    x[0, EOS] = 50.0
    install(sampler, 0, grammar=MANY_DIGITS, min_new_tokens=4, end_ids=(EOS,))
    output = [step(sampler, x, [0], i).token_ids[0] for i in range(5)]
    assert EOS not in output[:4]
    assert output[4] == EOS


def test_tokens_beyond_the_base_models_vocabulary_are_in_no_grammar(sampler):
    x = torch.zeros(1, VOCAB + 40)
    x[0, VOCAB:] = 50.0
    install(sampler, 0, temperature=0.0, grammar=DIGITS)
    assert step(sampler, x, [0], 0).token_ids == [ord("0")]


def test_a_token_outside_the_grammar_is_an_error_of_its_row(sampler, monkeypatch):
    install(sampler, 0, temperature=0.0, grammar=DIGITS)
    install(sampler, 1, temperature=0.0)
    monkeypatch.setattr(sampler_module, "argmax", lambda logits: torch.tensor([EOS, EOS]))
    assert step(sampler, logits(2), [0, 1], 0).errors == [f"token {EOS} left the grammar", None]


def test_masks_are_not_made_from_a_state_that_has_not_heard_of_its_last_token(sampler):
    install(sampler, 0, grammar=DIGITS)
    sampler.sample(logits(1), [0], [0])
    with pytest.raises(AssertionError, match="not read"):
        sampler.sample(logits(1), [0], [1])


def test_a_grammar_freed_while_its_row_was_in_flight_is_left_alone(sampler):
    install(sampler, 0, grammar=DIGITS)
    launched = sampler.sample(logits(1), [0], [0])
    install(sampler, 0, grammar=MANY_DIGITS, temperature=0.0)
    assert sampler.read(launched.to_cpu()).errors == [None]
    x = torch.zeros(1, VOCAB)
    x[0, EOS] = 50.0
    assert step(sampler, x, [0], 0).token_ids == [ord("0")]  # still at its beginning, where it may not end


def test_what_cannot_be_sampled_is_refused_before_a_slot_is_taken(sampler):
    bare = Sampler(VOCAB, CPU)
    with pytest.raises(BadRequest, match="this server runs without one"):
        bare.check(SamplingParams(), VOCAB, DIGITS)
    with pytest.raises(BadRequest, match="the grammar cannot be used"):
        sampler.check(SamplingParams(), VOCAB, "{}")
    with pytest.raises(BadRequest, match="logit_bias: token id 1003"):
        sampler.check(SamplingParams(logit_bias={"1003": 1.0}), VOCAB, None)
    sampler.check(SamplingParams(logit_bias={"1003": 1.0}), VOCAB + 1, DIGITS)
    with pytest.raises(BadRequest):
        install(sampler, 0, logit_bias={"1003": 1.0})
    assert not sampler.needs_tokens([0])


@pytest.mark.parametrize("grammar", [False, True])
def test_a_step_uploads_its_numbers_and_its_masks_and_nothing_else(sampler, monkeypatch, grammar):
    for slot, some in enumerate(variety(22)):
        some.install(sampler, slot)
    if grammar:
        install(sampler, 22, grammar=DIGITS)
    uploads: list[torch.Tensor] = []
    monkeypatch.setattr(sampler_module, "upload", lambda values, device: uploads.append(values) or values)
    n = 22 + grammar
    step(sampler, logits(n), list(range(n)), 0)
    assert len(uploads) == 1 + grammar
    uploads.clear()
    for slot in range(n):
        install(sampler, slot, temperature=0.0)
    step(sampler, logits(n), list(range(n)), 0)
    assert uploads == []


def test_wrong_shapes_are_our_bug(sampler):
    with pytest.raises(AssertionError):
        sampler.sample(logits(2), [0], [0])
    with pytest.raises(AssertionError):
        sampler.sample(logits(1).double(), [0], [0])


def test_a_step_without_rows(sampler):
    assert sample(sampler, logits(0), []) == Sampled([], [], [])
