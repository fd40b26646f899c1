"""Arithmetic that the kernels of `layers/` and `lora/` share, so that they give the same bits."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice


def fast_silu(x: torch.Tensor) -> bool:
    """Whether `silu_times` may use CUDA's approximations: their error (1e-5) vanishes when rounded to 16 bits."""
    return x.is_cuda and x.dtype != torch.float32


@triton.jit
def silu_times(gate, up, FAST: tl.constexpr):
    """silu(gate) · up, each of the two rounded to gate's type, as torch's F.silu(gate) * up is."""
    kind: tl.constexpr = gate.dtype
    wide = gate.to(tl.float32)
    # FAST takes half the instructions, but flushes results below 1e-38
    silu = libdevice.fast_dividef(wide, 1.0 + libdevice.fast_expf(-wide)) if FAST else wide * tl.sigmoid(wide)
    return (silu.to(kind).to(tl.float32) * up.to(tl.float32)).to(kind)
