"""Experts in 8-bit floats: what they hold, what they multiply to beside matrices of their own, what they refuse."""

import logging

import pytest
import torch

from multilora.errors import ModelUnsupported
from multilora.layers.experts import sort_by_expert
from multilora.layers.weights import fp8_arithmetic
from multilora.layers.weights.base import ExpertsFormat
from multilora.layers.weights.fp8 import Activations, Fp8Blocks, Fp8Rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KIND = {"device": CPU, "dtype": torch.float32}
EXPERTS, PARTS, WIDTH = 4, (32, 16), 72
MADE, ROWS, BLOCKS = Fp8Rows(), Fp8Rows(("scale",), per_row=True), Fp8Blocks("scale", (16, 32))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def tensors_of(kind: ExpertsFormat, outs: int, seed: int) -> dict[str, torch.Tensor]:
    """What a checkpoint has of one matrix."""
    weight = random(outs, WIDTH, seed=seed)
    if kind is MADE:
        return {"weight": weight}
    scales = (outs, 1) if kind is ROWS else (outs // 16, 3)
    return {"weight": weight.to(torch.float8_e4m3fn), "scale": random(*scales, seed=seed).abs() + 0.5}


@pytest.mark.parametrize("kind", [MADE, ROWS, BLOCKS], ids=["made", "rows", "blocks"])
def test_every_expert_computes_what_its_own_matrix_would(kind: ExpertsFormat) -> None:
    """Bit for bit: the definition is one."""
    together = kind.make_experts(EXPERTS, PARTS, WIDTH, **KIND)
    with pytest.raises(ModelUnsupported, match="no scale"):
        together.check_filled()
    alone = [kind.make(sum(PARTS), WIDTH, **KIND) for _ in range(EXPERTS)]
    for expert, single in enumerate(alone):
        for i, part in enumerate((slice(0, 32), slice(32, 48))):
            for name, tensor in tensors_of(kind, part.stop - part.start, 10 * expert + i).items():
                single.load(part, name, tensor)
                start = together.rows_of(expert).start
                together.load(slice(start + part.start, start + part.stop), name, tensor)
    together.check_filled()
    x = random(9, WIDTH)
    taken = torch.tensor([[0, 3], [3, 1], [0, 1], [3, 0], [1, 0], [3, 1], [0, 3], [1, 3], [0, 1]])  # nobody takes 2
    rows = sort_by_expert(taken, EXPERTS)
    y = together.grouped_matmul(x[rows.tokens], rows)
    for expert, single in enumerate(alone):
        mine = rows.experts == expert
        assert expert == 2 or torch.equal(y[mine], single.matmul(x[rows.tokens[mine]], None))
        assert torch.equal(together.dequantised(together.rows_of(expert)), single.dequantised(slice(None)))


@pytest.mark.parametrize("kind", [MADE, BLOCKS], ids=["made", "blocks"])
def test_they_are_held_in_8_bit(kind: ExpertsFormat) -> None:
    weight = kind.make_experts(EXPERTS, PARTS, WIDTH, **KIND)
    scales = 48 if kind is MADE else 3 * 3
    assert sum(p.nbytes for p in weight.parameters()) == EXPERTS * (48 * WIDTH + 4 * scales)
    weight.randomise(torch.Generator().manual_seed(0))
    weight.check_filled()
    for expert in range(EXPERTS):
        assert 0.01 < weight.dequantised(weight.rows_of(expert)).std() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_out_has_the_dtype_of_what_goes_in(dtype: torch.dtype) -> None:
    weight = BLOCKS.make_experts(2, (16,), WIDTH, device=CPU, dtype=dtype)
    weight.randomise(torch.Generator().manual_seed(0))
    rows = sort_by_expert(torch.tensor([[1], [0]]), 2)
    y = weight.grouped_matmul(random(2, WIDTH).to(dtype), rows)
    assert (y.dtype, y.shape) == (dtype, (2, 16))


@pytest.mark.parametrize(
    ("kind", "parts", "said"),
    [
        (
            Fp8Rows(("s",), activations=Activations.STATIC),
            (8,),
            "experts in fp8 by tensors, activations static are not",
        ),
        (Fp8Rows(("s",), per_row=True, activations=Activations.NONE), (8,), "fp8 by rows, activations none are not"),
        (Fp8Blocks("s", (16, 16), Activations.NONE), (16,), "16 x 16, activations none .*; with activations dynamic"),
        (
            Fp8Blocks("s", (16, 16)),
            (24, 24),
            "of 24 and 24 outputs in fp8 .* are not .*; of a multiple of 16 they are",
        ),
    ],
)
def test_what_experts_cannot_have_is_named(kind: ExpertsFormat, parts: tuple[int, ...], said: str) -> None:
    with pytest.raises(ModelUnsupported, match=said):
        kind.make_experts(2, parts, 32, **KIND)


def test_which_experts_graphs_hold(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Those that have a kernel. Of others the log says why."""
    obstacle = fp8_arithmetic.grouped_obstacle.__wrapped__
    assert not BLOCKS.make_experts(2, (16,), 32, **KIND).capturable
    monkeypatch.setattr(fp8_arithmetic, "has_fp8", lambda _: True)
    assert obstacle(CUDA, None) is None and obstacle(CUDA, (128, 128)) is None
    with caplog.at_level(logging.WARNING):
        assert obstacle(CUDA, (48, 48)) == "blocks of 48 x 48 have no kernel"
        monkeypatch.setattr(fp8_arithmetic, "has_fp8", lambda _: False)
        assert obstacle(CUDA, None) == "the GPU has no fp8 products"
    assert caplog.messages == [
        f"fp8: {why}: experts are dequantised one by one for every product, which is slower and no CUDA graph's"
        for why in ("blocks of 48 x 48 have no kernel", "the GPU has no fp8 products")
    ]
