"""Weights in oneDNN's order: the same numbers as plain ones, held once."""

import pytest
import torch

from multilora.layers.weights import onednn
from multilora.layers.weights.onednn import OneDnnWeight, reorders
from multilora.layers.weights.plain import PLAIN, PlainWeight

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not reorders(CPU, torch.bfloat16), reason="oneDNN has no bf16 on this CPU")


def make(out_features: int = 96, in_features: int = 64) -> tuple[OneDnnWeight, torch.Tensor]:
    weight = PLAIN.make(out_features, in_features, device=CPU, dtype=torch.bfloat16)
    assert isinstance(weight, OneDnnWeight)
    matrix = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight.load(slice(None), "weight", matrix)
    return weight, matrix


def x_of(rows: int, width: int = 64) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).bfloat16()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 16, 64, 513])
@pytest.mark.parametrize(("out_features", "in_features"), [(96, 64), (33, 50), (1, 8)])
def test_products(rows: int, out_features: int, in_features: int, biased: bool) -> None:
    weight, matrix = make(out_features, in_features)
    x, bias = x_of(rows, in_features), torch.randn(out_features).bfloat16() if biased else None
    y = weight.matmul(x, bias)
    assert y.shape == (rows, out_features) and y.is_contiguous() and y.dtype == torch.bfloat16
    want = x.double() @ matrix.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(y.double(), want, atol=0.1, rtol=8e-3)


def test_the_matrix_is_held_once_and_comes_back_bit_by_bit() -> None:
    weight, matrix = make()
    assert torch.equal(weight.dequantised(slice(3, 9)), matrix[3:9])
    weight.matmul(x_of(2), None)
    assert weight.data.untyped_storage().nbytes() == 0 and weight.data.shape == matrix.shape
    assert torch.equal(weight.dequantised(slice(None)), matrix)
    assert torch.equal(weight.dequantised(slice(3, 9)), matrix[3:9])
    assert sum(p.numel() * p.element_size() for p in weight.parameters()) == matrix.nbytes


def test_filling_it_again_counts() -> None:
    weight, matrix = make()
    weight.matmul(x_of(2), None)
    weight.load(slice(32, 64), "weight", -matrix[32:64])
    matrix[32:64] *= -1
    assert torch.equal(weight.dequantised(slice(None)), matrix)
    torch.testing.assert_close(weight.matmul(x_of(4), None), x_of(4) @ matrix.T)
    weight.drop()
    weight.load(slice(None), "weight", 2 * matrix)
    torch.testing.assert_close(weight.matmul(x_of(4), None), x_of(4) @ (2 * matrix).T)
    weight.randomise(torch.Generator().manual_seed(0))
    assert weight.dequantised(slice(None)).float().std() < 0.1
    assert not torch.equal(weight.matmul(x_of(4), None), x_of(4) @ (2 * matrix).T)


def test_only_bf16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not reorders(torch.device("cuda"), torch.bfloat16)
    for dtype in (torch.float32, torch.float16):
        assert type(PLAIN.make(8, 8, device=CPU, dtype=dtype)) is PlainWeight
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not onednn.reorders.__wrapped__(CPU, torch.bfloat16)
