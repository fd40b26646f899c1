"""The small operations between matrix products as one Triton kernel each, for CUDA.

The torch code in `norm.py`, `activation.py` and `matmul.py` is their specification, rounding included; `ops.py`
chooses.
"""

import torch
import triton
import triton.language as tl

from multilora.kernels.triton_launch import can_launch_early, launch, wait_for_previous
from multilora.kernels.triton_math import fast_silu, silu_times
from multilora.layers.norm import NormForm

SILU_BLOCK = 1024  # columns of one program
COMBINE_BLOCK = 512
MATVEC_ELEMENTS, MATVEC_COLUMNS = 4096, 2048  # of the weight, at a time in one program


@triton.jit
def _add_rms_norm(x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, eps, x_row, x_head, size,
                  BLOCK: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr, ONE_PLUS: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """One program per (row, head). total = x + residual if ADD, else x; out = total / rms(total) · weight, or
    · (1 + weight) if ONE_PLUS. WIDE: rounded once, else before the weight too."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    mask = i < size
    at = (row * tl.num_programs(1) + head) * size + i
    kind = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    total = tl.load(x_ptr + row * x_row + head * x_head + i, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(kind)
        tl.store(total_ptr + at, rounded, mask=mask)
        total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / size + eps)
    normed = total * scale
    if not WIDE:
        normed = normed.to(kind).to(tl.float32)
    if ONE_PLUS:
        weight += 1.0
    tl.store(out_ptr + at, (weight * normed).to(kind), mask=mask)


@triton.jit
def _silu_and_mul(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr, FAST: tl.constexpr, PDL: tl.constexpr):
    """One program per (row, block of columns)."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    gate = tl.load(gate_up_ptr + row * 2 * width + i, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * width + width + i, mask=mask, other=0.0)
    tl.store(out_ptr + row * width + i, silu_times(gate, up, FAST), mask=mask)


@triton.jit
def _combine_experts(y_ptr, places_ptr, weights_ptr, out_ptr, size, COUNT: tl.constexpr, BLOCK: tl.constexpr,
                     PDL: tl.constexpr):  # fmt: skip
    """One program per (token, block of columns): Σ weight · row of y, in fp32, over those of the token's COUNT rows
    whose weight is not 0."""
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(COUNT):
        row = tl.load(places_ptr + token * COUNT + k)
        weight = tl.load(weights_ptr + token * COUNT + k).to(tl.float32)
        y = tl.load(y_ptr + row * size + i, mask=mask, other=0.0).to(tl.float32)
        total += weight * tl.where(weight != 0.0, y, 0.0)
    tl.store(out_ptr + token * size + i, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _embed_part(ids_ptr, weight_ptr, out_ptr, first, held, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program per token: its row of the table, zeros where the table does not hold it."""
    wait_for_previous(PDL)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    local = tl.load(ids_ptr + row) - first
    end = tl.where((local >= 0) & (local < held), size, 0)
    x = tl.load(weight_ptr + local * size + i, mask=i < end, other=0.0)
    tl.store(out_ptr + row * size + i, x, mask=i < size)


@triton.jit
def _matvec(x_ptr, weight_ptr, bias_ptr, out_ptr, size: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            BIAS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per ROWS rows of the weight. The next block is under way while this one is multiplied; the first
    one is so already while the kernel before still runs, since nobody writes weights."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    at = weight_ptr + n.to(tl.int64)[:, None] * size + k[None, :]
    weight = tl.load(at, eviction_policy="evict_first")
    wait_for_previous(PDL)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size, COLUMNS):
        x = tl.load(x_ptr + start + k)
        sums += weight.to(tl.float32) * x.to(tl.float32)[None, :]
        if start + COLUMNS < size:
            weight = tl.load(at + start + COLUMNS, eviction_policy="evict_first")
    y = tl.sum(sums, axis=1)
    if BIAS:
        y += tl.load(bias_ptr + n).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, form: NormForm) -> torch.Tensor:
    """x: [rows, size] or [rows, heads, size], the last dimension contiguous; form: see `NormForm`. Returns the same
    shape, contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(x, None, weight, eps, form, out, None)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, form: NormForm
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual: [rows, size], contiguous. Returns (norm(x + residual), x + residual)."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch_norm(x, residual, weight, eps, form, out, total)
    return out, total


def _launch_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    form: NormForm,
    out: torch.Tensor,
    total: torch.Tensor | None,
) -> None:
    size = x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    block = triton.next_power_of_2(size)
    early = can_launch_early(x.device)
    args = (x, residual, weight, out, total, eps, x.stride(0), x.stride(1), size)
    wide, one_plus = form is not NormForm.ROUNDED, form is NormForm.ONE_PLUS
    constants = {"BLOCK": block, "ADD": residual is not None, "WIDE": wide, "ONE_PLUS": one_plus, "PDL": early}
    launch(_add_rms_norm, (x.shape[0], heads), args, constants, early=early, num_warps=min(16, max(1, block // 512)))


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up: [tokens, 2 · width], contiguous. Returns [tokens, width]."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    early = can_launch_early(gate_up.device)
    grid = tokens, triton.cdiv(width, SILU_BLOCK)
    constants = {"BLOCK": SILU_BLOCK, "FAST": fast_silu(gate_up), "PDL": early}
    launch(_silu_and_mul, grid, (gate_up, out, width), constants, early=early)
    return out


def embed_part(ids: torch.Tensor, weight: torch.Tensor, held: range) -> torch.Tensor:
    """ids: int64 [tokens]; weight: [≥ len(held), size], contiguous, the rows of the tokens `held`. Returns [tokens,
    size], zeros for tokens that are not."""
    tokens, size = len(ids), weight.shape[1]
    out = torch.empty(tokens, size, dtype=weight.dtype, device=weight.device)
    early, block = can_launch_early(weight.device), triton.next_power_of_2(size)
    args = (ids, weight, out, held.start, len(held), size)
    constants = {"BLOCK": block, "PDL": early}
    launch(_embed_part, (tokens,), args, constants, early=early, num_warps=min(16, max(1, block // 512)))
    return out


def combine_experts(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """y: [rows, size]; places: int64 [tokens, k]; weights: [tokens, k]; all contiguous. Returns [tokens, size]."""
    tokens, count = places.shape
    out = torch.empty(tokens, y.shape[1], dtype=y.dtype, device=y.device)
    early = can_launch_early(y.device)
    block = min(COMBINE_BLOCK, triton.next_power_of_2(y.shape[1]))
    constants = {"COUNT": count, "BLOCK": block, "PDL": early}
    grid = tokens, triton.cdiv(y.shape[1], block)
    launch(_combine_experts, grid, (y, places, weights, out, y.shape[1]), constants, early=early)
    return out


def matvec_fits(weight: torch.Tensor) -> bool:
    """Whether `matvec` takes this weight, [out, in]."""
    rows, columns = _matvec_blocks(weight)
    return columns >= 256 and weight.shape[0] % rows == 0


def matvec(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """x: [1, in], contiguous; weight: [out, in], one that `matvec_fits`. Returns x Wᵀ + b, [1, out], as `dtype`."""
    out = torch.empty(1, weight.shape[0], dtype=dtype, device=x.device)
    rows, columns = _matvec_blocks(weight)
    early = can_launch_early(x.device)
    constants = {"size": weight.shape[1], "ROWS": rows, "COLUMNS": columns, "BIAS": bias is not None, "PDL": early}
    launch(_matvec, (weight.shape[0] // rows,), (x, weight, bias, out), constants, early=early, num_warps=8)
    return out


def _matvec_blocks(weight: torch.Tensor) -> tuple[int, int]:
    """Rows and columns that one program takes at a time."""
    size = weight.shape[1]
    columns = min(MATVEC_COLUMNS, size & -size)
    return MATVEC_ELEMENTS // columns, columns
