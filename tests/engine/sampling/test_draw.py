import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import batch_of

from multilora.engine.sampling.batch import Column
from multilora.engine.sampling.draw import draw
from multilora.params import SamplingParams

CASES = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.8},
    {"temperature": 0.8, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 2.0, "top_k": 5, "top_p": 0.9, "min_p": 0.3},
]


def kept_distribution(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Slow, in fp64, one row: what the parameters promise."""
    z = logits.astype(np.float64) / p.temperature
    probs = np.exp(z - z.max())
    probs /= probs.sum()
    order = np.argsort(-logits, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(probs[order])[:-1]])
    kept = before < p.top_p
    if p.top_k > 0:
        kept &= np.arange(len(order)) < p.top_k
    kept &= probs[order] >= p.min_p * probs.max() * (1 - 1e-12)
    kept[0] = True
    out = np.zeros_like(probs)
    out[order[kept]] = probs[order[kept]]
    return out / out.sum()


def many(logits: np.ndarray, params: SamplingParams, n: int) -> np.ndarray:
    rows = torch.from_numpy(logits.astype(np.float32)).expand(n, -1).contiguous()
    return draw(rows, batch_of([params] * n, [9] * n, list(range(n))).numbers).numpy()


def draw_at(logits: torch.Tensor, params: SamplingParams, uniform: list[float]) -> list[int]:
    """Tokens for given uniform numbers."""
    numbers = batch_of([params] * len(logits), [0] * len(logits), [0] * len(logits)).numbers
    numbers[Column.UNIFORM] = uniform
    return draw(logits, numbers).tolist()


SLOW = (CASES[2], CASES[7])
"""Like those before them."""


@pytest.mark.parametrize(
    "fields", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES], ids=str
)
def test_frequencies_follow_the_distribution(fields):
    params = SamplingParams(**fields)
    n = 20_000
    logits = np.random.default_rng(1).normal(size=12) * 1.5
    expected = kept_distribution(logits, params) * n
    seen = np.bincount(many(logits, params, n), minlength=12)
    assert set(np.flatnonzero(seen)) == set(np.flatnonzero(expected > 1))
    kept = expected > 0
    chi2 = ((seen[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi2 < 31.3  # p = 0.001 at 11 degrees of freedom, the most there are


values = st.one_of(st.sampled_from([0.0, 1.0, 2.0, -1.5, float("-inf")]), st.floats(-8, 8, width=32))
parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([-1, 1, 2, 5, 1000]),
    top_p=st.sampled_from([1e-9, 0.31, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.11, 1.0]),
)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(values, min_size=2, max_size=40), parameters, st.floats(0, 1, exclude_max=True))
def test_inverts_the_cumulative_distribution_in_order_of_token_ids(logits, params, u):
    row = np.array([*logits, 0.5], dtype=np.float32)  # at least one token is possible
    (token,) = draw_at(torch.from_numpy(row)[None], params, [u])
    cumulative = np.cumsum(kept_distribution(row, params))
    assert row[token] > float("-inf")
    if np.abs(cumulative - u).min() > 1e-5 and not near_a_cut(row, params):
        assert token == np.searchsorted(cumulative, u, side="right")


def near_a_cut(row: np.ndarray, p: SamplingParams) -> bool:
    """Whether fp32 may put a token on the other side of the nucleus or of min-p than fp64 does."""
    probs = kept_distribution(row, SamplingParams(temperature=p.temperature))
    mass = np.cumsum(np.sort(probs)[::-1])
    ratio = probs / probs.max()
    return bool(np.abs(mass - p.top_p).min() < 1e-5 or (p.min_p < 1 and np.abs(ratio - p.min_p).min() < 1e-5))


@pytest.mark.parametrize("fields", [{"top_k": 2}, {"top_p": 0.45}, {"top_k": 2, "top_p": 0.9}], ids=str)
def test_of_equal_logits_the_lowest_ids_stay(fields):
    logits = np.array([0.0, 3.0, 3.0, 0.0, 3.0, 3.0])
    assert set(many(logits, SamplingParams(**fields), 200).tolist()) == {1, 2}


def test_equals_fill_only_the_places_that_better_ones_leave():
    logits = np.array([3.0, 5.0, 3.0, 3.0, 5.0])
    assert set(many(logits, SamplingParams(top_k=3), 400).tolist()) == {0, 1, 4}


def test_the_nucleus_is_complete_once_its_mass_is_reached():
    assert set(many(np.zeros(4), SamplingParams(top_p=0.5), 400).tolist()) == {0, 1}
    assert set(many(np.zeros(4), SamplingParams(top_p=0.5001), 400).tolist()) == {0, 1, 2}


def test_high_temperature_does_not_blur_the_order_of_top_k():
    logits = np.linspace(0.0, 1e-4, 50)
    assert set(many(logits, SamplingParams(temperature=1e5, top_k=3), 200).tolist()) == {47, 48, 49}


@pytest.mark.parametrize("temperature", [1e-6, 1e-44, 1e-300])
def test_tiny_temperatures_are_the_argmax(temperature):
    logits = np.array([1.0, 1.001, -3e38, 0.0])
    assert set(many(logits, SamplingParams(temperature=temperature), 50).tolist()) == {1}


def test_extreme_uniform_numbers_stay_inside_the_kept_tokens():
    row = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]] * 2)
    assert draw_at(row, SamplingParams(), [0.0, 1 - 2.0**-53]) == [1, 2]


def test_a_row_of_nan_disturbs_nobody():
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    params = [SamplingParams(), SamplingParams(top_p=0.5), SamplingParams()]
    numbers = batch_of(params, [1, 2, 3], [0, 0, 0]).numbers
    whole = draw(logits, numbers)
    logits[1, 7] = float("nan")
    broken = draw(logits, numbers)
    assert broken[[0, 2]].equal(whole[[0, 2]])
    assert 0 <= broken[1] < 50


def test_more_rows_than_one_pass_takes():
    torch.manual_seed(0)
    logits = torch.randn(11, 40_003)
    params = [SamplingParams(**CASES[i % len(CASES)]) for i in range(11)]
    numbers = batch_of(params, list(range(11)), list(range(11))).numbers
    together = draw(logits, numbers).tolist()
    assert together == [draw(logits[i : i + 1], numbers[:, i : i + 1]).item() for i in range(11)]
