"""The order in which experts take rows, what they compute and the weighted sum, against plain loops."""

import pytest
import torch
import torch.nn.functional as F
from fakes.layer_context import BASE

from multilora.layers.experts import Experts, combine, sort_by_expert
from multilora.layers.weights.awq import Awq
from multilora.layers.weights.base import ExpertsFormat
from multilora.layers.weights.fp8 import Fp8Blocks, Fp8Rows
from multilora.layers.weights.plain import PLAIN
from multilora.lora.sites import LoraSite, LoraSlice

CPU = torch.device("cpu")


def make_experts(
    count: int,
    hidden: int,
    inner: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    weight_format: ExpertsFormat = PLAIN,
) -> Experts:
    gate_up = LoraSite(0, 0, "gate_up", hidden, (LoraSlice("gate_up", 0, 2 * inner),), count)
    down = LoraSite(1, 0, "down", inner, (LoraSlice("down", 0, hidden),), count)
    return Experts(gate_up, down, device=device, dtype=dtype, weight_format=weight_format)


def taken(tokens: int, top_k: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(top_k).indices


@pytest.mark.parametrize(("tokens", "top_k", "num_experts"), [(1, 1, 1), (1, 3, 8), (7, 2, 4), (40, 8, 16)])
def test_rows_are_sorted_by_expert(tokens: int, top_k: int, num_experts: int) -> None:
    numbers = taken(tokens, top_k, num_experts)
    rows = sort_by_expert(numbers, num_experts)
    start = 0
    for expert, end in enumerate(rows.ends.tolist()):
        assert rows.tokens[start:end].tolist() == (numbers == expert).any(1).nonzero()[:, 0].tolist()
        start = end
    assert start == tokens * top_k
    for token in range(tokens):
        for k in range(top_k):
            row = rows.places[token, k]
            assert rows.tokens[row] == token
            assert int((rows.ends <= row).sum()) == numbers[token, k]
    assert (rows.ends.dtype, rows.tokens.dtype, rows.places.dtype) == (torch.int32, torch.int64, torch.int64)


def test_within_an_expert_rows_are_sorted_by_segment() -> None:
    numbers, segments = taken(20, 3, 5), torch.tensor([1] * 6 + [0] * 4 + [2] * 9 + [0])
    rows = sort_by_expert(numbers, 5, segments)
    assert rows.segments is not None
    assert torch.equal(rows.segments, segments[rows.tokens])
    order = list(zip(rows.experts.tolist(), rows.segments.tolist(), strict=True))
    assert order == sorted(order)
    plain = sort_by_expert(numbers, 5)
    assert torch.equal(plain.ends, rows.ends)
    assert plain.segments is None
    assert all(rows.experts[rows.places[t, k]] == numbers[t, k] for t in range(20) for k in range(3))


def test_experts_against_their_formula() -> None:
    module = make_experts(5, 16, 12)
    for param in module.parameters():
        param.normal_()
    x, experts, weights = torch.randn(7, 16), taken(7, 2, 5), torch.rand(7, 2)
    rows = sort_by_expert(experts, 5)
    got = combine(module(x, rows, BASE), rows, weights)
    for token in range(7):
        expected = torch.zeros(16)
        for k in range(2):
            first, second = (
                w.dequantised(w.rows_of(int(experts[token, k]))) for w in (module.gate_up_proj, module.down_proj)
            )
            gate, up = (first @ x[token]).chunk(2)
            expected += weights[token, k] * (second @ (F.silu(gate) * up))
        torch.testing.assert_close(got[token], expected, atol=1e-4, rtol=1e-4)


FORMATS = {
    "plain": PLAIN,
    "fp8 by rows": Fp8Rows(),
    "fp8 in blocks": Fp8Blocks("scale", (32, 32)),
    "4 bit": Awq(32),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", FORMATS)
def test_experts_in_a_graph_on_a_gpu(kind: str) -> None:
    """One graph serves whatever experts the rows take."""
    device = torch.device("cuda")
    module = make_experts(16, 64, 32, device, torch.bfloat16, FORMATS[kind])
    if not module.capturable:
        pytest.skip("no grouped product here")
    dtype = torch.bfloat16 if kind == "4 bit" else torch.float32  # in fp32 they are held dequantised
    wide = make_experts(16, 64, 32, dtype=dtype, weight_format=FORMATS[kind])
    for mine, theirs in ((wide.gate_up_proj, module.gate_up_proj), (wide.down_proj, module.down_proj)):
        mine.randomise(torch.Generator().manual_seed(0))
        for name, param in mine.named_parameters():
            scale = 10.0 if name != "data" or kind == "plain" else 1.0
            if kind == "4 bit":
                scale = torch.tensor([10.0, 1.0]) if name == "scales" else 1.0  # no zeros
            param.copy_(param.float() * scale)
            theirs.get_parameter(name).copy_(param)
    x = torch.randn(24, 64, device=device, dtype=torch.bfloat16)
    experts, weights = taken(24, 4, 16).to(device), torch.rand(24, 4, device=device)

    def run() -> torch.Tensor:
        rows = sort_by_expert(experts, 16)
        return combine(module(x, rows, BASE), rows, weights)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(3):
        experts.copy_(taken(24, 4, 16, seed))
        graph.replay()
        rows = sort_by_expert(experts.cpu(), 16)
        expected = combine(wide(x.cpu().to(dtype), rows, BASE), rows, weights.cpu())
        error = (out.cpu().float() - expected).norm() / expected.norm()
        assert error < (0.01 if kind == "plain" else 0.03), (
            "what is rounded to bf16 may be rounded to 8 bit differently"
        )


def test_the_shares_of_ranks_add_up_to_the_whole() -> None:
    """Each computes its own experts' rows; those of others hold what no number is, and are not looked at."""
    g = torch.Generator().manual_seed(3)
    experts = torch.stack([torch.randperm(6, generator=g)[:3] for _ in range(7)])
    weights = torch.rand(7, 3, generator=g)
    y = torch.randn(6, 7, 4, generator=g)  # what each expert makes of each token
    segments = torch.tensor([0, 1, 1, 2, 0, 3, 3])
    total = torch.zeros(7, 4)
    for rank in range(3):
        held = range(2 * rank, 2 * rank + 2)
        rows = sort_by_expert(experts, 6, segments, held)
        assert rows.segments is not None and rows.ends.tolist() == sorted(rows.ends.tolist())
        count = int(rows.ends[-1])
        assert (rows.experts[:count] + held.start >= held.start).all() and not rows.segments[count:].any()
        found = torch.full((21, 4), torch.nan)
        found[:count] = y[rows.experts[:count] + held.start, rows.tokens[:count]]
        assert torch.equal(rows.segments[:count], segments[rows.tokens[:count]])
        inside = (experts >= held.start) & (experts < held.stop)
        assert count == int(inside.sum())
        total += combine(found, rows, weights * inside)
    expected = (weights[..., None] * y[experts, torch.arange(7)[:, None]]).sum(1)
    torch.testing.assert_close(total, expected)
