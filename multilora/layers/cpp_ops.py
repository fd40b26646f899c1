"""The small operations of a layer on a CPU, in C++, and products of few rows. What they compute is said by `norm.py`,
`activation.py` and `matmul.py`."""

import torch

from multilora.kernels.cpp.library import DTYPES, library
from multilora.layers import norm
from multilora.layers.norm import NormForm

_FORMS = {form: number for number, form in enumerate(NormForm)}
"""The numbers by which `ops.cpp` knows them."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, form: NormForm) -> torch.Tensor:
    """x: [rows, size] or [rows, heads, size], whose last dimension lies contiguous; weight: [size]. What is of
    two dtypes is torch's."""
    if weight.dtype != x.dtype:
        return norm.rms_norm(x, weight, eps, form)
    heads = x if x.dim() == 3 else x[:, None]
    y = torch.empty(x.shape, dtype=x.dtype)
    library().rms_norm(
        *(x.data_ptr(), heads.stride(0), heads.shape[0], heads.stride(1), heads.shape[1], heads.shape[2]),
        *(None, weight.data_ptr(), eps, _FORMS[form], y.data_ptr(), None, DTYPES[x.dtype]),
    )
    return y


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, form: NormForm
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual), of [rows, size]."""
    if not x.dtype == residual.dtype == weight.dtype:
        total = x + residual
        return rms_norm(total, weight, eps, form), total
    x, residual = x.contiguous(), residual.contiguous()
    y, total = torch.empty_like(x), torch.empty_like(x)
    rows, size = x.shape
    library().rms_norm(
        *(x.data_ptr(), size, rows, 0, 1, size, residual.data_ptr(), weight.data_ptr(), eps, _FORMS[form]),
        *(y.data_ptr(), total.data_ptr(), DTYPES[x.dtype]),
    )
    return y, total


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up: [rows, 2 · width]. Returns [rows, width]."""
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, width)
    library().silu_and_mul(gate_up.data_ptr(), rows, width, y.data_ptr(), DTYPES[gate_up.dtype])
    return y


def few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + b in fp32. x: [rows, in], weight: contiguous [out, in], bias: [out]. Returns [rows, out]."""
    assert x.shape[1] == weight.shape[1] and x.dtype == weight.dtype == torch.float32
    assert bias is None or bias.dtype == torch.float32
    x = x.contiguous()
    y = x.new_empty(len(x), len(weight))
    library().few_rows(
        *(x.data_ptr(), len(x), x.shape[1], weight.data_ptr(), None if bias is None else bias.data_ptr()),
        *(len(weight), y.data_ptr()),
    )
    return y
