import math

import pytest
import torch
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.engine.sampling.grammar import GrammarCache
from multilora.engine.sampling.logit_edits import LogitEdits
from multilora.engine.sampling.sampler import NONE_ALLOWED, NOT_FINITE, Sampled, Sampler, SampleRow
from multilora.params import SamplingParams

CPU = torch.device("cpu")
VOCAB = 1003  # odd, so that no vector width divides it
EOS = 2
INFO = xgrammar.TokenizerInfo([bytes([i]) for i in range(256)], vocab_size=VOCAB, stop_token_ids=[EOS])
GRAMMARS = GrammarCache(INFO.serialize_json(), VOCAB)
DIGITS = xgrammar.GrammarCompiler(INFO).compile_regex("[0-9]{3}").serialize_json()
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


def row(position=0, seed=0, output=(), prompt=(), eos=(EOS,), grammar=None, top_logprobs=-1, **fields) -> SampleRow:
    params = SamplingParams(**fields)
    edits = LogitEdits.make(params, prompt, eos, VOCAB, CPU)
    return SampleRow(params, seed, position, output, edits, grammar, top_logprobs)


def logits(rows: int, seed=0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def sample(x: torch.Tensor, rows: list[SampleRow]) -> Sampled:
    return Sampler(VOCAB, CPU).sample(x, rows).to_host()


def variety(n: int) -> list[SampleRow]:
    return [
        row(
            position=i,
            seed=i // 2,
            output=[3, i, i],
            prompt=[1, 2],
            top_logprobs=i % 4 - 1,
            **VARIETY[i % len(VARIETY)],
        )
        for i in range(n)
    ]


def test_a_row_never_depends_on_its_neighbours():
    n = 44
    x = logits(n)
    together = sample(x, variety(n))
    for i in range(n):
        alone = sample(x[i : i + 1], [variety(n)[i]])
        assert alone.token_ids[0] == together.token_ids[i]
        assert alone.logprobs[0] == together.logprobs[i]
        assert alone.top_logprobs[0] == together.top_logprobs[i]
    backwards = sample(x.flip(0), variety(n)[::-1])
    assert backwards.token_ids == together.token_ids[::-1]
    assert len(set(together.token_ids)) > n // 2


def test_the_same_seed_and_position_draw_the_same_token_and_others_do_not():
    x = logits(1).div(3).repeat(60, 1)
    drawn = sample(x, [row(seed=i % 2, position=i // 4) for i in range(60)]).token_ids
    assert drawn[0::4] == drawn[2::4]
    assert drawn[1::4] == drawn[3::4]
    assert drawn[0::4] != drawn[1::4]
    assert len(set(drawn[0::4])) > 5


def test_the_logits_are_left_as_they_are():
    x = logits(len(VARIETY))
    before = x.clone()
    sample(x, variety(len(VARIETY)))
    assert x.equal(before)


def test_a_greedy_batch_is_the_argmax_with_the_lowest_id_among_equals():
    x = logits(3)
    x[1, [800, 17, 400]] = 50.0
    result = sample(x, [row(temperature=0.0)] * 3)
    assert result == Sampled([x[0].argmax(), 17, x[2].argmax()], [None] * 3, [None] * 3, [None] * 3)
    drawn = sample(x[[1]].repeat(2, 1), [row(top_k=1), row(temperature=0.0)])
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
    prompt = [4, 5]
    expected = x[0].double()
    for token in set(prompt + output):
        expected[token] = expected[token] * repetition if expected[token] < 0 else expected[token] / repetition
    for token in output:
        expected[token] -= frequency
    for token, value in bias.items():
        expected[int(token)] += value
    if len(output) < minimum:
        expected[[EOS, 11]] = -math.inf
    fields = {"repetition_penalty": repetition, "frequency_penalty": frequency, "logit_bias": bias}
    fields |= {"min_new_tokens": minimum, "stop_token_ids": [11]}
    result = sample(x, [row(len(output), 0, output, prompt, temperature=0.0, **fields)])
    assert result.token_ids == [expected.argmax()]


def test_edits_act_before_random_draws_too():
    x = torch.zeros(200, VOCAB)
    x[:, [EOS, 7]] = 30.0
    rows = [row(seed=i, min_new_tokens=1, top_p=0.9 if i % 2 else 1.0) for i in range(200)]
    assert set(sample(x, rows).token_ids) == {7}
    rows = [row(seed=i, position=1, min_new_tokens=1) for i in range(200)]
    assert set(sample(x, rows).token_ids) == {EOS, 7}


def test_logprobs_are_raw():
    x = logits(4)
    rows = [
        row(temperature=0.0, logit_bias={"77": 100.0}, top_logprobs=0),
        row(temperature=0.0),
        row(temperature=0.2, seed=3, top_k=5, top_logprobs=2),
        row(temperature=5.0, seed=4, repetition_penalty=1.5, prompt=[1, 2, 3], top_logprobs=1),
    ]
    result = sample(x, rows)
    assert result.token_ids[0] == 77
    reference = x.double().log_softmax(-1)
    for i in (0, 2, 3):
        assert result.logprobs[i] == pytest.approx(reference[i, result.token_ids[i]].item(), abs=1e-5)
    assert result.logprobs[1] is None
    assert [None if top is None else len(top) for top in result.top_logprobs] == [0, None, 2, 1]
    assert [token for _, token in result.top_logprobs[2]] == reference[2].topk(2).indices.tolist()


@pytest.mark.parametrize("fields", VARIETY, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_an_error_of_their_row(fields, value):
    x = logits(3)
    intact = sample(x, [row(seed=1, **fields)] * 3)
    x[1, 500] = value
    result = sample(x, [row(seed=1, **fields)] * 3)
    assert result.errors == [None, NOT_FINITE, None]
    assert result.token_ids[::2] == intact.token_ids[::2]
    assert 0 <= result.token_ids[1] < VOCAB


def test_nan_hides_behind_no_mask():
    x = logits(1)
    x[0, 500] = math.nan  # no digit
    assert sample(x, [row(grammar=GRAMMARS.start(DIGITS, [EOS]))]).errors == [NOT_FINITE]


def test_padded_vocabulary_is_never_drawn():
    x = torch.zeros(300, VOCAB)
    x[:, 10:] = -math.inf
    result = sample(x, [row(seed=i, **VARIETY[1 + i % 5]) for i in range(300)])
    assert set(result.token_ids) <= set(range(10))
    assert result.errors == [None] * 300


def test_nothing_allowed_is_an_error_of_its_row():
    x = torch.full((2, VOCAB), -math.inf)
    x[:, EOS] = 1.0
    result = sample(x, [row(min_new_tokens=1), row(seed=1)])
    assert result.errors == [NONE_ALLOWED, None]


def test_grammar_rows_among_others():
    x = logits(3)
    state = GRAMMARS.start(DIGITS, [EOS])
    output: list[int] = []
    while not state.is_terminated:
        constrained = row(len(output), 5, output, grammar=state, min_new_tokens=50)
        result = sample(x, [row(temperature=0.0), constrained, row(seed=9)])
        assert result.errors == [None] * 3
        assert state.accept(result.token_ids[1])
        output.append(result.token_ids[1])
    free = sample(x, [row(temperature=0.0), row(), row(seed=9)])
    assert result.token_ids[::2] == free.token_ids[::2]
    assert output[-1] == EOS
    assert len(output) == 4
    assert bytes(output[:3]).isdigit()


def test_min_new_tokens_holds_under_a_grammar_that_may_end():
    x = torch.zeros(1, VOCAB)
    x[0, EOS] = 50.0
    state = GRAMMARS.start(xgrammar.GrammarCompiler(INFO).compile_regex("[0-9]+").serialize_json(), [EOS])
    output: list[int] = []
    while not state.is_terminated:
        (token,) = sample(x, [row(len(output), 1, output, grammar=state, min_new_tokens=4)]).token_ids
        assert state.accept(token)
        output.append(token)
    assert len(output) == 5


def test_wrong_shapes_are_our_bug():
    with pytest.raises(AssertionError):
        sample(logits(2), [row()])
    with pytest.raises(AssertionError):
        sample(logits(1).double(), [row()])


def test_a_step_without_rows():
    assert sample(logits(0), []) == Sampled([], [], [], [])
