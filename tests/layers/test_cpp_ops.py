"""The C++ operations against torch's: within a rounding of the dtype, over odd sizes, strides and extreme values."""

import pytest
import torch
import torch.nn.functional as F
from cpp import NEEDS_CPP

from multilora.layers.cpp_ops import add_rms_norm, rms_norm, silu_and_mul
from multilora.layers.norm import NormForm
from multilora.layers.norm import rms_norm as specified
from multilora.layers.ops import small_ops

pytestmark = NEEDS_CPP

ULP = {torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = pytest.mark.parametrize("dtype", list(ULP))
FORMS = pytest.mark.parametrize("form", list(NormForm))


def randn(*size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
@FORMS
@pytest.mark.parametrize("size", [1, 7, 16, 33, 768, 4100])
def test_norm(size: int, form: NormForm, dtype: torch.dtype) -> None:
    x, weight = randn(19, size, dtype=dtype) * 30, randn(size, dtype=dtype, seed=1)
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-5, form), specified(x, weight, 1e-5, form), rtol=2 * ULP[dtype], atol=1e-6
    )


@FORMS
def test_norm_of_heads_that_are_a_part_of_a_wider_tensor(form: NormForm) -> None:
    """As q and k are parts of what the joined projection gives."""
    q = randn(5, 9, 24, dtype=torch.float32)[:, 2:6]
    weight = randn(24, dtype=torch.float32, seed=1)
    got = rms_norm(q, weight, 1e-6, form)
    assert got.is_contiguous()
    torch.testing.assert_close(got, specified(q, weight, 1e-6, form), rtol=1e-6, atol=1e-6)


@DTYPES
@FORMS
@pytest.mark.parametrize("size", [5, 48, 100])
def test_norm_of_a_sum(size: int, form: NormForm, dtype: torch.dtype) -> None:
    """The sum is rounded before it is squared: its bits are torch's."""
    x, residual, weight = randn(40, size, dtype=dtype), randn(40, size, dtype=dtype, seed=1), randn(size, dtype=dtype)
    y, total = add_rms_norm(x, residual, weight, 1e-5, form)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, specified(total, weight, 1e-5, form), rtol=2 * ULP[dtype], atol=1e-6)


@DTYPES
@pytest.mark.parametrize("width", [1, 15, 16, 200])
def test_activation(width: int, dtype: torch.dtype) -> None:
    gate_up = randn(9, 2 * width, dtype=dtype) * 10
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(silu_and_mul(gate_up), F.silu(gate) * up, rtol=2 * ULP[dtype], atol=1e-6)


@pytest.mark.parametrize("width", [1, 16])
def test_activation_of_extreme_values(width: int) -> None:
    """Nothing overflows on the way, and a NaN stays one."""
    values = [0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 104.0, -104.0, 3e38, -3e38, torch.inf, torch.nan]
    gate = torch.tensor(values)[:, None].expand(-1, width)
    got = silu_and_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    torch.testing.assert_close(got, F.silu(gate), rtol=1e-5, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("form", [NormForm.WIDE, NormForm.ONE_PLUS])
def test_norm_whose_weight_has_another_dtype_is_torch_s(form: NormForm) -> None:
    x, residual = randn(3, 40, dtype=torch.bfloat16), randn(3, 40, dtype=torch.bfloat16, seed=1)
    weight = randn(40, dtype=torch.float32, seed=2)
    assert torch.equal(rms_norm(x, weight, 1e-5, form), specified(x, weight, 1e-5, form))
    y, total = add_rms_norm(x, residual, weight, 1e-5, form)
    assert torch.equal(total, x + residual) and torch.equal(y, specified(total, weight, 1e-5, form))


def test_nan_and_infinity_in_16_bit() -> None:
    x = torch.tensor([[torch.nan] * 20, [3e38] * 20, [1.0] * 20], dtype=torch.bfloat16)
    _, total = add_rms_norm(x, x, torch.ones(20, dtype=torch.bfloat16), 1e-5, NormForm.ROUNDED)
    torch.testing.assert_close(total, x + x, rtol=0, atol=0, equal_nan=True)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    from multilora.kernels.cpp.library import library

    x, weight = randn(500, 768, dtype=torch.bfloat16), randn(768, dtype=torch.bfloat16)
    found = []
    for threads in (1, 2, 5):
        library().set_num_threads(threads)
        found.append((rms_norm(x, weight, 1e-5, NormForm.ROUNDED), silu_and_mul(x)))
    library().set_num_threads(torch.get_num_threads())
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_other_dtypes_are_left_to_torch() -> None:
    assert small_ops(torch.device("cpu"), torch.float64) is None
    assert small_ops(torch.device("cpu"), torch.bfloat16) is not None
