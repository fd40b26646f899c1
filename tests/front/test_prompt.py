import numpy
import pytest

from multilora.errors import BadRequest, PromptTooLong
from multilora.front.prompt import TextPrompt, check_logprobs, check_prompt, engine_params, read_prompts, spread
from multilora.params import SamplingParams


def effective(prompt_tokens: int = 10, sample: int = 0, **params) -> SamplingParams:
    return engine_params(SamplingParams(**params), prompt_tokens, 100, 50, sample=sample)


def test_good_prompts():
    check_prompt([0, 49], 100, 50, "prompt")
    check_prompt([1] * 99, 100, 50, "prompt")


@pytest.mark.parametrize(("ids", "says"), [([], "empty"), ([1, 50], "50"), ([1, -1], "-1"), ([10**20], "1000000")])
def test_bad_prompts(ids, says):
    with pytest.raises(BadRequest, match=says) as e:
        check_prompt(ids, 100, 50, "prompt")
    assert e.value.param == "prompt"


@pytest.mark.parametrize("length", [100, 101])
def test_a_prompt_that_fills_the_context(length):
    with pytest.raises(PromptTooLong, match=f"is 100 tokens.*requested {length + 1} tokens"):
        check_prompt([1] * length, 100, 50, "prompt")


@pytest.mark.parametrize(("asked", "given"), [(None, 90), (1000, 90), (91, 90), (90, 90), (5, 5), (0, 0)])
def test_max_new_tokens_ends_at_the_context(asked, given):
    assert effective(max_new_tokens=asked).max_new_tokens == given


def test_min_new_tokens_is_clamped_too():
    assert effective(max_new_tokens=200, min_new_tokens=150).min_new_tokens == 90


def test_other_ends_stop_as_eos_does():
    def stops(**params):
        return engine_params(SamplingParams(**params), 10, 100, 50, ends=[48]).stop_token_ids

    assert (stops(), stops(stop_token_ids=[7])) == ([48], [7, 48])
    assert (stops(ignore_eos=True), stops(stop_token_ids=[7], ignore_eos=True)) == (None, [7])


def test_text_and_n_stay_in_the_front():
    params = effective(
        n=3, stop=["x"], stop_regex="y", json_schema="{}", max_new_tokens=None, temperature=0.5, stop_token_ids=[3]
    )
    assert params == SamplingParams(max_new_tokens=90, temperature=0.5, stop_token_ids=[3])


def test_each_sample_has_its_own_seed():
    assert [effective(n=3, sampling_seed=7, sample=i).sampling_seed for i in range(3)] == [7, 8, 9]
    assert effective(sampling_seed=2**63 - 1, sample=1).sampling_seed == -(2**63)
    assert effective(sample=2).sampling_seed is None


@pytest.mark.parametrize(
    "params",
    [{"stop_token_ids": [3, 50]}, {"logit_bias": {"3": 1.0, "50": 1.0}}],
    ids=["stop_token_ids", "logit_bias"],
)
def test_token_ids_outside_the_vocabulary(params):
    with pytest.raises(BadRequest, match="token id 50") as e:
        effective(**params)
    assert e.value.param == next(iter(params))


def test_a_stop_token_does_not_excuse_a_bias():
    with pytest.raises(BadRequest) as e:
        effective(stop_token_ids=[3], logit_bias={"60": 1.0})
    assert e.value.param == "logit_bias"


@pytest.mark.parametrize(
    ("given", "several"), [("x", False), ([5, 6], False), (["x"], True), ([[5]], True), ((5,), False), (("x",), True)]
)
def test_one_prompt_or_several(given, several):
    prompts, found = read_prompts(given, "text")
    assert found == several
    expected = list(given) if several else [given if isinstance(given, str) else list(given)]
    assert [p.text if isinstance(p, TextPrompt) else p for p in prompts] == expected


NO_PROMPTS = [[], [True], [5, True], [[5], [False]], [5, 0.5], [numpy.int64(5)], 5, None, ["x", 5]]


@pytest.mark.parametrize("given", NO_PROMPTS)
def test_what_is_no_prompt(given):
    with pytest.raises(BadRequest) as caught:
        read_prompts(given, "text")
    assert caught.value.param == "text"


def test_one_value_or_one_for_each():
    assert (spread(1, 2, "x"), spread([1, 2], 2, "x"), spread((1, 2), 2, "x")) == ([1, 1], [1, 2], [1, 2])
    with pytest.raises(BadRequest, match="x has 1 entries for 2 inputs"):
        spread([1], 2, "x")


@pytest.mark.parametrize(("start", "top"), [(-1, 0), (0, 50), (10, 1)])
def test_logprobs_that_exist(start, top):
    check_logprobs(start, top, 10, 50)


@pytest.mark.parametrize(
    ("start", "top", "param"),
    [
        (-2, 0, "logprob_start_len"),
        (11, 0, "logprob_start_len"),
        (0, 51, "top_logprobs_num"),
        (0, -1, "top_logprobs_num"),
    ],
)
def test_logprobs_that_do_not(start, top, param):
    with pytest.raises(BadRequest) as caught:
        check_logprobs(start, top, 10, 50)
    assert caught.value.param == param
