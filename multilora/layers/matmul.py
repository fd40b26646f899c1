"""x Wᵀ + b, the way that is fastest on the device for that many rows.

Called by `weights/`, `grouped_matmul.py` and `embedding.py`.
"""

import torch
import torch.nn.functional as F

from multilora.layers.ops import fused_ops, small_ops

FEW_ROWS = range(1, 33)
"""Where C++ beats x Wᵀ in fp32 on CPU: 1.5 to 1.7 times at 4 and 8 rows, 1.3 at 16, 1.1 at 1 and 32 (docs/log.md)."""

TURNED_ROWS = range(8, 64)
"""Where W xᵀ beats it: 1.5 to 1.8 times at 16 to 48 rows, nothing at 4 and at 64 (docs/log.md)."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [rows, in], weight: [out, in], bias: [out]. Returns [rows, out], contiguous."""
    ops = fused_ops(x.device)
    if ops is not None and x.shape[0] == 1 and ops.matvec_fits(weight):
        row: torch.Tensor = ops.matvec(x, weight, bias, x.dtype)
        return row
    wide_on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if wide_on_cpu and x.shape[0] in FEW_ROWS and weight.is_contiguous():
        cpp = small_ops(x.device, x.dtype)
        if cpp is not None:
            few: torch.Tensor = cpp.few_rows(x, weight, bias)
            return few
    if wide_on_cpu and x.shape[0] in TURNED_ROWS:
        y = torch.mm(weight, x.T).T.contiguous()
        return y if bias is None else y.add_(bias)
    return F.linear(x, weight, bias)


def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x: [rows, in], weight: [vocab, in]. Returns fp32 [rows, vocab], on CUDA never rounded to less."""
    ops = fused_ops(x.device)
    if ops is None or weight.dtype == torch.float32:
        return linear(x, weight).float()
    if x.shape[0] == 1 and ops.matvec_fits(weight):
        row: torch.Tensor = ops.matvec(x, weight, None, torch.float32)
        return row
    return torch.mm(x, weight.t(), out_dtype=torch.float32)
