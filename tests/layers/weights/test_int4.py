"""Weights of 4 bits that stay packed: what they multiply with is what the checkpoint says, up to bf16.

Covers `weights/int4_arithmetic.py` too. CUDA's tiles are read here by a second description, lane by lane; what
a GPU makes of them is for the tests that need one.
"""

from typing import Any

import numpy as np
import packed_integers
import pytest
import torch
from packed_integers import Integers, pack_awq, pack_compressed, pack_gptq

from multilora.errors import ModelUnsupported
from multilora.layers.weights import int4_arithmetic as arithmetic
from multilora.layers.weights.awq import Awq
from multilora.layers.weights.base import Share, Weight
from multilora.layers.weights.compressed_tensors import PackedIntegers
from multilora.layers.weights.gptq import Gptq
from multilora.layers.weights.int4 import Int4Weight
from multilora.layers.weights.integer_format import IntegerFormat
from multilora.layers.weights.unpacked import UnpackedWeight

CPU = torch.device("cpu")
WIDTH = 128


def integers(outs: int, size: int, *, symmetric: bool = False, order: bool = False, seed: int = 0) -> Integers:
    weight = torch.randn(outs, WIDTH, generator=torch.Generator().manual_seed(seed))
    shuffled = np.random.default_rng(seed).permutation(WIDTH) if order else None
    return packed_integers.rounded(weight, 4, size, symmetric=symmetric, order=shuffled)


LAYOUTS: dict[str, tuple[IntegerFormat, dict[str, Any], Any]] = {
    "awq": (Awq(32), {"size": 32}, pack_awq),
    "gptq": (Gptq(4, 64, 1), {"size": 64}, lambda i: pack_gptq(i, 4)),
    "gptq, any order": (
        Gptq(4, 32, 0, ordered=False),
        {"size": 32, "order": True},
        lambda i: pack_gptq(i, 4, older=False),
    ),
    "compressed": (
        PackedIntegers(4, None, symmetric=True, ordered=True),
        {"size": WIDTH, "symmetric": True},
        lambda i: pack_compressed(i, 4, symmetric=True, in_order=True),
    ),
}


def load(weight: Weight, rows: slice, tensors: dict[str, torch.Tensor]) -> None:
    outs = rows.stop - rows.start
    stored = weight.tensors(rows, Share(outs, WIDTH, range(outs), range(WIDTH)))
    assert tensors.keys() == {name for name, s in stored.items() if not s.optional}
    for name, tensor in tensors.items():
        weight.load(rows, name, tensor.contiguous())


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Scales are rounded to bf16, zeros by themselves: so what a weight is off by is a part of its scale."""
    torch.testing.assert_close(found.float(), expected, atol=0.02 * float(expected.abs().max()), rtol=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_products_are_those_of_the_dequantised_weight(layout: str, rows: int) -> None:
    kind, options, pack = LAYOUTS[layout]
    weight = kind.make(128, WIDTH, device=CPU, dtype=torch.bfloat16)
    assert isinstance(weight, Int4Weight) and weight.dtype == torch.bfloat16
    ints = integers(128, **options)
    load(weight, slice(0, 128), pack(ints))
    close(weight.dequantised(slice(None)), ints.weight)
    assert torch.equal(weight.dequantised(slice(3, 9)), weight.dequantised(slice(None))[3:9])
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.arange(128).bfloat16()
    own = weight.dequantised(slice(None)).float()
    torch.testing.assert_close(weight.matmul(x, bias).float(), x.float() @ own.T + bias, atol=0.2, rtol=0.02)
    close(weight.matmul(x, None), x.float() @ ints.weight.T)


def test_matrices_below_each_other_are_packed_one_by_one() -> None:
    kind = Awq(32)
    weight = kind.make(64 + 128, WIDTH, device=CPU, dtype=torch.bfloat16)
    parts = [(slice(0, 64), integers(64, 32, seed=1)), (slice(64, 192), integers(128, 32, seed=2))]
    for rows, ints in reversed(parts):
        load(weight, rows, pack_awq(ints))
    close(weight.dequantised(slice(None)), torch.cat([ints.weight for _, ints in parts]))
    assert kind.merges([64, 128]) and not kind.merges([64, 8])
    assert not Gptq(4, 32, 1, ordered=False).merges([64, 128]), "each reads its inputs in an order of its own"


def test_it_takes_a_quarter_of_the_memory() -> None:
    weight = Awq(128).make(256, 1024, device=CPU, dtype=torch.bfloat16)
    held = sum(p.numel() * p.element_size() for p in weight.parameters())
    assert held == 256 * 1024 // 2 + 256 * 8 * 2 * 2


def test_noise_has_the_size_of_noise() -> None:
    weight = Awq(32).make(64, WIDTH, device=CPU, dtype=torch.bfloat16)
    weight.randomise(torch.Generator().manual_seed(0))
    values = weight.dequantised(slice(None)).float()
    assert abs(float(values.mean())) < 2e-3 and 0.015 < float(values.std()) < 0.025


@pytest.mark.parametrize(
    ("kind", "outs", "dtype", "said"),
    [
        (Awq(32), 64, torch.float32, "the model is in float32"),
        (Awq(16), 64, torch.bfloat16, "groups of 32, 64, 128, 256 inputs, it has 16"),
        (Awq(32), 40, torch.bfloat16, "40 outputs of 128 inputs are not whole tiles"),
        (Gptq(8, 32, 1), 64, torch.bfloat16, "8 bits do not stay packed"),
    ],
)
def test_what_cannot_stay_packed_is_dequantised_and_the_log_says_why(
    kind: IntegerFormat, outs: int, dtype: torch.dtype, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    from multilora.layers.weights import integer_format

    integer_format._say.cache_clear()
    with caplog.at_level("INFO"):
        weight = kind.make(outs, WIDTH, device=CPU, dtype=dtype)
        kind.make(outs, WIDTH, device=CPU, dtype=dtype)
    assert isinstance(weight, UnpackedWeight)
    assert len(caplog.messages) == 1 and said in caplog.messages[0] and "held dequantised" in caplog.messages[0]


def test_an_order_that_nobody_announced_is_refused() -> None:
    ints = integers(64, 32, order=True)
    weight = Gptq(4, 32, 0).make(64, WIDTH, device=CPU, dtype=torch.bfloat16)
    with pytest.raises(ModelUnsupported, match="g_idx: groups of different sizes, or in another order"):
        load(weight, slice(0, 64), pack_gptq(ints, 4, older=False))


def tiles(numbers: np.ndarray, inner: int) -> torch.Tensor:
    """CUDA's tiles, written lane by lane: tensor cores' B operand of 16 inputs by 8 outputs."""
    outs, width = numbers.shape
    found = np.zeros((outs // 8, width // (16 * inner), 32, inner // 2), dtype=np.uint32)
    for n, k, lane, word in np.ndindex(*found.shape):
        row, first = 8 * n + lane // 4, 16 * (k * inner + 2 * word) + 2 * (lane % 4)
        columns = [first, first + 8, first + 16, first + 24]
        for place, column in enumerate([*columns, *(c + 1 for c in columns)]):
            found[n, k, lane, word] |= np.uint32(int(numbers[row, column]) << (4 * place))
    return torch.from_numpy(found.view(np.int32))


@pytest.mark.parametrize("inner", [2, 4, 8])
def test_tiles_of_cuda_are_read(inner: int) -> None:
    numbers = np.random.default_rng(inner).integers(0, 16, (16, 32 * inner))
    assert torch.equal(arithmetic.numbers_of(tiles(numbers, inner)), torch.from_numpy(numbers).int())


def test_tiles_fill_the_memory_that_is_made_for_them() -> None:
    for width, inner in ((32, 2), (64, 4), (96, 2), (256, 8)):
        assert arithmetic.inner(width) == inner
        made = arithmetic.packed_like(16, width, torch.device("meta"))
        assert made.shape == (2, width // (16 * inner), 32, inner // 2) and made.nbytes == 16 * width // 2


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 64, 65, 300])
@pytest.mark.parametrize(("outs", "width"), [(64, 96), (256, 512)])
def test_on_a_gpu(rows: int, outs: int, width: int) -> None:
    device, g = torch.device("cuda"), torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 16, (outs, width), dtype=torch.int32, generator=g).to(device)
    scales = (torch.rand(width // 32, outs, 2, generator=g) / 8).bfloat16().to(device)
    packed = arithmetic.pack(numbers)
    assert packed.shape == arithmetic.packed_like(outs, width, device).shape
    assert torch.equal(arithmetic.numbers_of(packed), numbers)
    weight = torch.empty(outs, width, dtype=torch.bfloat16, device=device)
    arithmetic.dequantise_into(weight, packed, 32, scales)
    assert torch.equal(arithmetic.dequantise(packed, 32, scales), weight)
    x = torch.randn(rows, width, generator=g).bfloat16().to(device)
    expected = x.float() @ weight.float().T
    torch.testing.assert_close(arithmetic.product(x, packed, 32, scales).float(), expected, atol=0.3, rtol=0.02)


def test_what_torch_packs_otherwise_stays_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """How numbers lie in a packed matrix is torch's own business: it is tried before anything is trusted to it."""
    assert arithmetic.disagreement(CPU) is None
    pack = arithmetic.pack
    arithmetic.disagreement.cache_clear()
    monkeypatch.setattr(arithmetic, "pack", lambda numbers: pack(numbers.flip(1).contiguous()))
    try:
        assert "is not the one that is known here" in str(arithmetic.disagreement(CPU))
        weight = Gptq(4, 64, 1).make(64, WIDTH, device=CPU, dtype=torch.bfloat16)
        assert isinstance(weight, UnpackedWeight)
    finally:
        arithmetic.disagreement.cache_clear()
