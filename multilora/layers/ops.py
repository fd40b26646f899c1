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


@functools.cache
def small_ops(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Norms and the activation: in Triton on CUDA, in C++ on a CPU with a compiler; None elsewhere."""
    if device.type == "cpu":
        from multilora.kernels.cpp.library import DTYPES, obstacle

        if dtype in DTYPES and obstacle() is None:
            from multilora.layers import cpp_ops

            return cpp_ops
    return fused_ops(device)
