"""Products of rows with the matrices of their experts, whose integers of 4 bits stay packed.

W[o, i] = (q - zero) · scale, rounded to bf16, where zero and scale belong to the output and the group of inputs. A
byte has two numbers: of every 32 inputs, byte j has number j in its low half and number 16 + j in its high one, so
that a kernel reads the inputs of either half side by side. Scales and zeros of an expert's outputs lie beside each
other, for one group after the other. Called by `int4_experts.py` and `integer_format.py`.
"""

import torch

from multilora.layers.matmul import linear
from multilora.layers.weights.int4_arithmetic import CAPABILITY

RUN = 32
"""Inputs whose numbers lie in 16 bytes that follow each other."""


def obstacle(device: torch.device, dtype: torch.dtype, width: int, group: int) -> str | None:
    """What keeps experts with so many inputs, of which `group` share a scale, from staying packed; None: nothing."""
    if dtype != torch.bfloat16:
        return f"packed products are in bfloat16, the model is in {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return "packed products need a GPU of compute capability 8.0 or later"
    if group % RUN:
        return f"packed products of experts take groups of a multiple of {RUN} inputs, it has {group}"
    if width % group:
        return f"{width} inputs are not whole groups of {group}"
    return None


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """numbers: int32 [outs, width], 0 … 15. Returns uint8 [outs, width / 2]."""
    halves = numbers.to(torch.uint8).view(len(numbers), -1, 2, RUN // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def numbers_of(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [outs, width] from what `pack` returns."""
    parts = packed.view(len(packed), -1, RUN // 2)
    return torch.stack((parts & 15, parts >> 4), 2).flatten(1)


def dequantise(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """packed: uint8 [outs, width / 2]; scales: bf16 [groups, outs, 2], scale and zero. Returns W, [outs, width]."""
    scale, zero = scales.float().transpose(0, 1)[..., None].unbind(2)  # [outs, groups, 1]
    q = numbers_of(packed).float().unflatten(1, (len(scales), -1))
    wide: torch.Tensor = (q - zero) * scale
    return wide.to(scales.dtype).flatten(1)


def grouped_product(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x: bf16 [rows, width], sorted by expert, contiguous; packed: uint8 [experts, outs, width / 2]; scales: bf16
    [experts, groups, outs, 2], scale and zero, which is a whole number; ends: int32 [experts], the row after each
    expert's last. Returns bf16 [rows, outs], in which rows from the last end on are of no use.
    """
    if x.device.type == "cuda":
        from multilora.layers.triton_int4_grouped import grouped_product as fused

        return fused(x, packed, scales, ends)
    y = x.new_empty(len(x), packed.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            y[start:end] = linear(x[start:end], dequantise(packed[expert], scales[expert]))
        start = end
    return y
