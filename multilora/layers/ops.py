"""Which implementation of the small operations a device takes."""

import functools
from types import ModuleType

import torch


@functools.cache
def fused_ops(device: torch.device) -> ModuleType | None:
    """The Triton operations on CUDA; None elsewhere: the layer's own torch code, which is their specification."""
    if device.type != "cuda":
        return None
    from multilora.layers import triton_ops

    return triton_ops
