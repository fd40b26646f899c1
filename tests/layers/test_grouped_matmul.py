"""The product of rows with the matrices of their experts, against plain loops."""

import pytest
import torch

from multilora.layers import grouped_matmul
from multilora.layers.experts import sort_by_expert
from multilora.layers.grouped_matmul import grouped_product, has_grouped_product

CPU = torch.device("cpu")


def taken(tokens: int, top_k: int, num_experts: int) -> torch.Tensor:
    scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(0))
    return scores.topk(top_k).indices


def test_every_row_is_multiplied_by_its_expert() -> None:
    weight, x = torch.randn(6, 5, 4), torch.randn(9, 4)
    experts = taken(3, 3, 6)
    rows = sort_by_expert(experts, 6)
    y = grouped_product(x[rows.tokens], weight, rows)
    for token in range(3):
        for k in range(3):
            torch.testing.assert_close(y[rows.places[token, k]], weight[experts[token, k]] @ x[token])


def test_the_grouped_product_and_the_loop_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has the product on the CPU too, where the loop is taken."""
    weight, x = torch.randn(6, 16, 24, dtype=torch.bfloat16), torch.randn(30, 24, dtype=torch.bfloat16)
    rows = sort_by_expert(taken(10, 3, 6), 6)
    looped = grouped_product(x, weight, rows)
    monkeypatch.setattr(grouped_matmul, "has_grouped_product", lambda *_: True)
    torch.testing.assert_close(grouped_product(x, weight, rows), looped, atol=1e-2, rtol=1e-2)


def test_only_bf16_on_some_devices_has_a_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert not has_grouped_product(CPU, torch.bfloat16)
    assert not has_grouped_product(cuda, torch.float16)
    for capability, expected in (((8, 0), False), ((9, 0), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert has_grouped_product(cuda, torch.bfloat16, 64, 24) == expected
        assert not has_grouped_product(cuda, torch.bfloat16, 64, 20)
