"""The kernels against the torch code that specifies them: without a GPU in Triton's interpreter, small and slow.

Covers `sampling/triton_kernels.py`, `sampling/triton_edit_kernels.py` too.
"""

import math
from typing import Any

import pytest
import torch
import xgrammar
from sampling_rows import batch_of, row

from multilora.engine.sampling import triton_sampling
from multilora.engine.sampling.batch import Column, Source
from multilora.engine.sampling.draw import draw, processed
from multilora.engine.sampling.edits import edited
from multilora.engine.sampling.logprobs import token_logprobs
from multilora.engine.sampling.sampler import Sampled, Sampler
from multilora.params import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 301
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, of the interpreter: inf − inf and 0 · inf
CASES = [
    {},
    {"temperature": 0.5},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 0.0},
    {"temperature": 1.5, "top_k": 60, "top_p": 0.8},
    {"top_k": 200, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 2.0, "top_p": 0.999},
    {"top_p": 1e-9},
    {"top_k": 1},
    {"temperature": 1e-30, "top_k": 5},
]


SLOW = pytest.mark.slow if DEVICE.type == "cpu" else ()
"""The interpreter's; whatever is drawn from such logits is tested in the quick tier, too."""


def each_with_each(kinds: list[str], others: list[Any]) -> list[Any]:
    """Every pair; in the quick tier every value of both, once."""
    pairs = [(i, j) for i in range(len(kinds)) for j in range(len(others))]
    return [pytest.param(kinds[i], others[j], marks=() if i == j else SLOW) for i, j in pairs]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in a small vocabulary."""
    if DEVICE.type == "cpu":
        for name, size in {
            "NARROW": 256,
            "COLLECT": 256,
            "SELECT": 256,
            "DRAW": 64,
            "EMIT": 256,
            "EDIT": 256,
        }.items():
            monkeypatch.setattr(triton_sampling, f"{name}_BLOCK", size)


def logits_of(kind: str, rows: int) -> torch.Tensor:
    x = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0))
    if kind == "peaked":
        return x * 5
    if kind == "flat":
        return x * 1e-2 - 40
    if kind == "ties":
        return (x + 3).bfloat16().float().mul(4).round().div(4)
    if kind == "equal":
        return torch.zeros_like(x)
    assert kind == "holes"
    x[:, ::3] = -math.inf
    return x * 60


def drawn(x: torch.Tensor, numbers) -> list[int]:
    x = x.to(DEVICE)
    no_counts = torch.zeros(1, 0, dtype=torch.int32, device=DEVICE)
    on_device = torch.from_numpy(numbers).to(DEVICE)
    kept = triton_sampling.keep(x, x.amax(-1), on_device, truncates=True)
    return triton_sampling.draw(x, x.amax(-1), on_device, no_counts, kept).tolist()


@pytest.mark.parametrize(
    "kind", ["peaked", "holes", *(pytest.param(k, marks=SLOW) for k in ("flat", "ties", "equal"))]
)
def test_draws_what_the_specification_draws(kind):
    n = len(CASES)
    x = logits_of(kind, n)
    numbers = batch_of([SamplingParams(**fields) for fields in CASES], list(range(n)), [3] * n).numbers
    assert drawn(x, numbers) == draw(x, numbers).tolist()


@pytest.mark.parametrize(
    "kind", ["peaked", *(pytest.param(k, marks=SLOW) for k in ("ties", "holes", "flat", "equal"))]
)
def test_processed_logits_are_those_of_the_specification(kind):
    n = len(CASES) + 1
    raw, x = logits_of("peaked", n) + 1, logits_of(kind, n)
    numbers = batch_of([SamplingParams(**fields) for fields in [*CASES, {"top_k": 2}]], [0] * n, [0] * n).numbers
    numbers[Column.SOURCE, :-1] = Source.TEMPERED
    numbers[Column.SOURCE, CASES.index({"temperature": 0.0})] = Source.EDITED
    want = processed(raw, x, numbers)
    assert want[-1].equal(raw[-1])
    args = x.to(DEVICE), x.amax(-1).to(DEVICE), torch.from_numpy(numbers).to(DEVICE)
    kept = triton_sampling.keep(*args, truncates=True)
    got = triton_sampling.processed(raw.to(DEVICE), *args, kept).cpu()
    assert got.isfinite().equal(want.isfinite())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for i, token in enumerate(drawn(x, numbers)):
        assert got[i, token].isfinite()


KEPT = each_with_each(["ties", "equal", "flat"], [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 150, "top_p": 0.6}])


@pytest.mark.parametrize(("kind", "fields"), KEPT, ids=str)
def test_what_is_kept_is_exactly_what_the_specification_keeps(kind, fields):
    """The tokens at both ends of the cumulative distribution, and where its last kept token begins."""
    x = logits_of(kind, 1).repeat(4, 1)
    numbers = batch_of([SamplingParams(**fields)] * 4, [0] * 4, [0] * 4).numbers
    numbers[Column.UNIFORM] = [0.0, 1 - 2.0**-53, 0.5, 0.999]
    assert drawn(x, numbers) == draw(x, numbers).tolist()


def test_more_candidates_than_their_buffer_holds(monkeypatch):
    monkeypatch.setattr(triton_sampling, "CANDIDATES", 16)
    x = logits_of("equal", 3)
    x[1] = logits_of("ties", 1)[0]
    numbers = batch_of([SamplingParams(top_p=0.61)] * 3, [0, 1, 2], [0] * 3).numbers
    assert drawn(x, numbers) == draw(x, numbers).tolist()


@pytest.mark.parametrize("passes", [1, 6])
def test_the_number_of_passes_changes_nothing(monkeypatch, passes):
    monkeypatch.setattr(triton_sampling, "PASSES", passes)
    x = logits_of("peaked", 2)
    numbers = batch_of([SamplingParams(top_k=40, top_p=0.9), SamplingParams(top_p=0.99)], [1, 2], [0, 0]).numbers
    assert drawn(x, numbers) == draw(x, numbers).tolist()


def test_a_row_does_not_depend_on_its_neighbours():
    n = 6
    x = logits_of("peaked", n)
    x[3, 100], x[4] = math.nan, -math.inf
    numbers = batch_of([SamplingParams(top_p=0.8, top_k=50)] * n, list(range(n)), [0] * n).numbers
    together = drawn(x, numbers)
    assert all(0 <= token < VOCAB for token in together)
    for i in (0, 2, 5):
        assert drawn(x[i : i + 1], numbers[:, i : i + 1].copy()) == [together[i]]


@pytest.mark.parametrize(("kind", "k"), each_with_each(["equal", "peaked", "ties"], [1, 20, 301]))
def test_best_ids(kind, k):
    x = logits_of(kind, 2)
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :k]
    assert triton_sampling.best_ids(x.to(DEVICE), k).tolist() == order.sort(-1).values.tolist()


def test_a_signed_zero_is_no_better_than_the_other():
    x = torch.full((1, VOCAB), -1.0)
    x[0, [5, 9, 290]] = torch.tensor([-0.0, 0.0, -0.0])
    assert triton_sampling.best_ids(x.to(DEVICE), 2).tolist() == [[5, 9]]
    numbers = batch_of([SamplingParams(temperature=0.0)], [0], [0]).numbers
    assert drawn(x, numbers) == [5]


def test_edits_equal_the_specification():
    info = xgrammar.TokenizerInfo([bytes([i]) for i in range(256)], vocab_size=290, stop_token_ids=[2])
    sampler = Sampler(VOCAB, torch.device("cpu"), [2])
    sampler.use_tokenizer(info.serialize_json())
    grammar = xgrammar.Grammar.from_regex("[a-z]+").serialize_json()
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.7}
    rows = [
        row(),
        row(output=(5, 5, 300), prompt=(9, 12), **penalties),
        row(logit_bias={str(i): i / 7 for i in range(0, 301, 4)}),
        row(ends=(3, 4), min_new_tokens=9, logit_bias={"4": 5.0}),
        row(grammar=grammar, logit_bias={"97": 3.0, "5": 9.0}),
        row(output=(97,), vocab_size=VOCAB + 20, repetition_penalty=0.5),
    ]
    for slot, some in enumerate(rows):
        some.install(sampler, slot)
    batch = sampler._table.batch(torch.arange(6).int().numpy(), torch.arange(6).int().numpy())
    masks, _ = sampler._masks(batch, list(range(6)), list(range(6)))
    x = torch.randn(6, VOCAB + 20, generator=torch.Generator().manual_seed(1)) * 3
    want = edited(x, batch.numbers, sampler._edits, masks, VOCAB)
    for name in ("counts", "bias_ids", "bias_values"):
        setattr(sampler._edits, name, getattr(sampler._edits, name).to(DEVICE))
    got = triton_sampling.edited(
        x.to(DEVICE), torch.from_numpy(batch.numbers).to(DEVICE), sampler._edits, masks.to(DEVICE), VOCAB, biases=True
    )
    torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-6)
    assert want[4].isfinite().sum() == 26


def test_the_chosen_token_is_counted():
    x = logits_of("peaked", 3).to(DEVICE)
    numbers = batch_of([SamplingParams(temperature=t) for t in (0.0, 1.0, 1.0)], [1, 2, 3], [0] * 3).numbers
    numbers[Column.COUNTS] = [2, 0, 1]
    counts = torch.zeros(3, 50, dtype=torch.int32, device=DEVICE)  # of a request that has 50 tokens only
    on_device = torch.from_numpy(numbers).to(DEVICE)
    kept = triton_sampling.keep(x, x.amax(-1), on_device, truncates=False)
    tokens = [triton_sampling.draw(x, x.amax(-1), on_device, counts, kept).tolist() for _ in range(2)]
    assert tokens[0] == tokens[1]
    expected = torch.zeros(3, 50, dtype=torch.int32)
    expected[2, min(tokens[0][0], 49)] += 4
    expected[1, min(tokens[0][2], 49)] += 4
    assert counts.cpu().equal(expected)


# ---------------------------------------------------------------------- the whole sampler, on a GPU


def steps(device: torch.device, n: int, vocab: int) -> list[Sampled]:
    """Three steps of rows of every kind."""
    sampler = Sampler(vocab, device)
    edits = [
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": {"3": 5}},
    ]
    for slot in range(n):
        fields = CASES[slot % len(CASES)] | edits[slot % 5] if slot % 5 < 3 else CASES[slot % len(CASES)]
        wants = {"top_logprobs": slot % 7 - 1, "ranks": slot % 2 == 0, "processed": slot % 3 == 0}
        row(prompt=(1, 2, 3), ends=(7,), seed=slot, **wants, **fields).install(sampler, slot)
    x = torch.randn(n, vocab, generator=torch.Generator().manual_seed(2)).mul(4).bfloat16().float().to(device)
    launched = [sampler.sample(x, list(range(n)), [position] * n) for position in range(3)]
    return [
        sampler.read(some.to_cpu()) for some in launched if device.type == "cpu" or torch.cuda.synchronize() is None
    ]


@pytest.mark.gpu
def test_cuda_samples_the_same_tokens_over_several_steps():
    on_cpu, on_cuda = steps(torch.device("cpu"), 64, 32_003), steps(torch.device("cuda"), 64, 32_003)
    assert [step.token_ids for step in on_cuda] == [step.token_ids for step in on_cpu]
    for got, want in zip(on_cuda, on_cpu, strict=True):
        assert got.errors == want.errors
        for a, b in zip(got.logprobs, want.logprobs, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
                assert [i for _, i in a.top] == [i for _, i in b.top]
                assert a.rank == b.rank


@pytest.mark.gpu
def test_cuda_at_the_size_of_llama():
    """Rows of 128,256 logits as a head in bf16 gives them, peaked and flat, each alone and together."""
    n, vocab = 24, 128_256
    x = torch.randn(n, vocab, generator=torch.Generator().manual_seed(3))
    x = (x * torch.linspace(0.05, 6, n)[:, None] + 3).bfloat16().float()
    params = [SamplingParams(**CASES[i % len(CASES)]) for i in range(n)]
    numbers = batch_of(params, list(range(n)), [1] * n).numbers
    together = drawn(x, numbers)
    assert together == draw(x, numbers).tolist()
    assert together == [drawn(x[i : i + 1], numbers[:, i : i + 1].copy())[0] for i in range(n)]


@pytest.mark.gpu
def test_cuda_prompt_logprobs():
    x = torch.randn(300, 32_003, generator=torch.Generator().manual_seed(4)).bfloat16().float()
    ids = torch.arange(300)
    got, want = token_logprobs(x.cuda(), ids.cuda(), 20).to_host(), token_logprobs(x, ids, 20).to_host()
    assert [[i for _, i in value.top] for value in got] == [[i for _, i in value.top] for value in want]
    assert [v.logprob for v in got] == pytest.approx([v.logprob for v in want], abs=1e-4)
