"""The small operations between matrix products as one Triton kernel each, for CUDA.

The torch code in `norm.py` and `activation.py` is their specification, rounding included; `ops.py` chooses.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

SILU_BLOCK = 1024  # columns of one program


@triton.jit
def _add_rms_norm(x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, eps, x_row, x_head, size,
                  BLOCK: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """One program per (row, head). total = x + residual if ADD, else x; out = total / rms(total) · weight."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    mask = i < size
    at = (row * tl.num_programs(1) + head) * size + i
    kind = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(x_ptr + row * x_row + head * x_head + i, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(kind)
        tl.store(total_ptr + at, rounded, mask=mask)
        total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / size + eps)
    normed = (total * scale).to(kind).to(tl.float32)
    tl.store(out_ptr + at, (weight * normed).to(kind), mask=mask)


@triton.jit
def _silu_and_mul(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """One program per (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    gate = tl.load(gate_up_ptr + row * 2 * width + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + i, mask=mask, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    silu = (gate * tl.sigmoid(gate)).to(kind).to(tl.float32)
    tl.store(out_ptr + row * width + i, (silu * up).to(kind), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [rows, size] or [rows, heads, size], the last dimension contiguous. Returns the same shape, contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(x, None, weight, eps, out, None)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual: [rows, size], contiguous. Returns (norm(x + residual), x + residual)."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch_norm(x, residual, weight, eps, out, total)
    return out, total


def _launch_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor | None,
) -> None:
    size = x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    block = triton.next_power_of_2(size)
    _add_rms_norm[(x.shape[0], heads)](
        x, residual, weight, out, total, eps, x.stride(0), x.stride(1), size,
        BLOCK=block, ADD=residual is not None, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up: [tokens, 2 · width], contiguous. Returns [tokens, width]."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    _silu_and_mul[(tokens, triton.cdiv(width, SILU_BLOCK))](gate_up, out, width, BLOCK=SILU_BLOCK)
    return out
