"""Arithmetic of 8-bit floats (e4m3) with scales: what the products of `fp8.py` mean, and the fast ways to have them.

A quantised tensor stands for q · scale. Weights have a scale for each row, or for each block; what is multiplied with
them has one for each row, or for each row and block of columns, found anew for every row, or one given for all.
The definition dequantises both and multiplies; the fast ways multiply first and scale what comes out, which is the
same up to the rounding of the sums.
"""

import functools
import logging

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
LEAST = 1e-10
"""What the largest number of a row counts as at least: rows of zeros need a scale, too."""
ALIGNED = 16
"""What both sizes of a matrix must be a multiple of for `torch._scaled_mm`."""
KERNEL_COLUMNS = (32, 64, 128, 256)
"""Columns that share a scale, of which there are kernels."""


def quantise(x: torch.Tensor, group: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [rows, in]. Returns e4m3 [rows, in] and fp32 scales: [rows, 1], or [rows, in / group rounded up]."""
    if x.device.type == "cuda" and has_fp8(x.device):
        from multilora.layers.triton_fp8 import quantise as fused

        return fused(x, group)
    rows, width = x.shape
    size = group or width
    parts = F.pad(x.float(), (0, -width % size)).view(rows, -1, size)
    scale = parts.abs().amax(-1, keepdim=True).clamp_(min=LEAST) / LARGEST
    return saturated(parts / scale).view(rows, -1)[:, :width].contiguous(), scale[..., 0]


def saturated(x: torch.Tensor) -> torch.Tensor:
    """x as e4m3; what is beyond its range becomes the largest number."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def dequantise(q: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (1, 1 << 62)) -> torch.Tensor:
    """q: [rows, in]; scale: one for each block of so many rows and columns. Returns fp32 [rows, in]."""
    rows, columns = q.shape
    spread = scale.repeat_interleave(block[0], 0)[:rows] if block[0] > 1 else scale
    if scale.shape[1] > 1:
        spread = spread.repeat_interleave(block[1], 1)[:, :columns]
    return q.float() * spread


def rows_product(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """x: e4m3 [rows, in], x_scale: [rows, 1]; weight: e4m3 [out, in], scale: [out, 1]. Returns [rows, out]."""
    if x.device.type == "cuda" and has_fp8(x.device):
        from multilora.layers import triton_fp8_rows as few

        if len(x) <= few.MOST_ROWS:
            return few.few_rows_product(x, x_scale, weight, scale, dtype)
    if rows_obstacle(x.device, weight.shape, dtype) is None:
        return scaled_product(x, x_scale, weight, scale, dtype)
    return F.linear(dequantise(x, x_scale).to(dtype), dequantise(weight, scale).to(dtype))


def scaled_product(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The same by torch's product of scaled rows."""
    return torch._scaled_mm(x, weight.t(), scale_a=x_scale, scale_b=scale.t(), out_dtype=dtype)  # noqa: SLF001


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether the GPU computes with 8-bit floats."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def rows_obstacle(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """What keeps a weight [out, in] from `scaled_product`; None: nothing does. Logged, once for each case."""
    found = None
    if device.type != "cuda":
        return f"on {device.type} the definition is computed"
    if not has_fp8(device):
        found = "the GPU has no fp8 products"
    elif dtype != torch.bfloat16:
        found = f"torch's fp8 product gives bfloat16, the model is {dtype}"
    elif any(size % ALIGNED for size in shape):
        found = f"{list(shape)} is no multiple of {ALIGNED}"
    if found is not None:
        logger.warning("fp8: %s: weights are dequantised for every product, which is slower", found)
    return found


def blocks_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """x: e4m3 [rows, in], x_scale: [rows, in / block]; weight: e4m3 [out, in], scale: one for each block of it.

    Returns `dtype` [rows, out].
    """
    if blocks_obstacle(x.device, block) is None:
        from multilora.layers.triton_fp8 import blocks_product as fused

        return fused(x, x_scale, weight, scale, block, dtype)
    dequantised = dequantise(x, x_scale, (1, block[1])).to(dtype)
    return F.linear(dequantised, dequantise(weight, scale, block).to(dtype))


@functools.cache
def blocks_obstacle(device: torch.device, block: tuple[int, int]) -> str | None:
    """What keeps a weight in blocks from the fused product; None: nothing does. Logged, once for each case."""
    found = None
    if device.type != "cuda":
        return f"on {device.type} the definition is computed"
    if not has_fp8(device):
        found = "the GPU has no fp8 products"
    elif block[1] not in KERNEL_COLUMNS:
        found = f"blocks of {block[0]} x {block[1]} have no kernel"
    if found is not None:
        logger.warning("fp8: %s: weights are dequantised for every product, which is slower", found)
    return found


def grouped_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    ends: torch.Tensor,
    block: tuple[int, int] | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`rows_product` (block None) or `blocks_product` of the rows of each expert with its own matrix.

    x: e4m3 [rows, in], sorted by expert, x_scale: [rows, 1] or [rows, in / block]; weight: e4m3 [experts, out, in],
    scale: [experts, out, 1], or [experts, …] with one for each block; ends: int32 [experts], the row after each
    expert's last. Returns `dtype` [rows, out], in which rows from the last end on are of no use.
    """
    if grouped_obstacle(x.device, block) is None:
        from multilora.layers.triton_fp8_grouped import grouped_product as fused

        return fused(x, x_scale, weight, scale, ends, block, dtype)
    y = torch.empty(len(x), weight.shape[1], dtype=dtype, device=x.device)
    spans = (1, block[1]) if block else (1, x.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            wide = dequantise(x[start:end], x_scale[start:end], spans).to(dtype)
            matrix = dequantise(weight[expert], scale[expert], block or spans).to(dtype)
            y[start:end] = F.linear(wide, matrix)
        start = end
    return y


@functools.cache
def grouped_obstacle(device: torch.device, block: tuple[int, int] | None) -> str | None:
    """What keeps experts from the fused product; None: nothing does, and the host is not asked. Logged, once for each
    case."""
    found = None
    if device.type != "cuda":
        return f"on {device.type} the definition is computed"
    if not has_fp8(device):
        found = "the GPU has no fp8 products"
    elif block is not None and block[1] not in KERNEL_COLUMNS:
        found = f"blocks of {block[0]} x {block[1]} have no kernel"
    if found is not None:
        logger.warning(
            "fp8: %s: experts are dequantised one by one for every product, which is slower and no CUDA graph's",
            found,
        )
    return found
