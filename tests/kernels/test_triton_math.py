"""silu(gate) · up in a kernel: what torch gives, at the ends of the range too."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import triton
import triton.language as tl

from multilora.kernels.triton_math import fast_silu, silu_times

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16]
if DEVICE.type == "cuda":  # the interpreter rounds bfloat16 towards zero
    DTYPES.append(torch.bfloat16)


@triton.jit
def _silu_times(gate_ptr, up_ptr, out_ptr, SIZE: tl.constexpr, FAST: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, silu_times(tl.load(gate_ptr + i), tl.load(up_ptr + i), FAST))


def in_a_kernel(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.to(DEVICE), up.to(DEVICE)
    out = torch.empty_like(gate)
    _silu_times[(1,)](gate, up, out, gate.numel(), fast_silu(gate))
    return out.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_torch_rounds_it(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(1024, generator=g).mul(8).to(dtype) for _ in range(2))
    want = F.silu(gate) * up
    got = in_a_kernel(gate, up)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=4 * torch.finfo(dtype).eps)
    assert (got == want).float().mean() > (0.3 if dtype == torch.float32 else 0.98)  # rounded at the same places


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter
def test_far_from_zero(dtype: torch.dtype) -> None:
    gate = torch.tensor([0.0, -20.0, -90.0, -1e4, 90.0, 1e4, torch.inf, torch.nan]).to(dtype)
    want = torch.tensor([0.0, -20.0 * math.exp(-20.0), 0.0, 0.0, 90.0, 1e4, torch.inf, torch.nan])
    got = in_a_kernel(gate, torch.ones(8, dtype=dtype))
    torch.testing.assert_close(got, want.to(dtype), atol=1e-12, rtol=1e-2, equal_nan=True)


def test_approximations_are_for_16_bits_on_cuda() -> None:
    assert not fast_silu(torch.zeros(1))
    assert not fast_silu(torch.zeros(1, dtype=torch.bfloat16))
