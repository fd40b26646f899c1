"""x Wᵀ + b, the way that is fastest on the device for that many rows.

Called by `weights/`, `grouped_matmul.py` and `embedding.py`.
"""

import torch
import torch.nn.functional as F

from multilora.layers.ops import fused_ops

FEW_ROWS = range(8, 64)
"""Where W xᵀ beats x Wᵀ in fp32 on CPU: 1.5 to 1.8 times at 16 to 48 rows, nothing at 4 and at 64 (docs/log.md)."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [rows, in], weight: [out, in], bias: [out]. Returns [rows, out], contiguous."""
    ops = fused_ops(x.device)
    if ops is not None and x.shape[0] == 1 and ops.matvec_fits(weight):
        row: torch.Tensor = ops.matvec(x, weight, bias, x.dtype)
        return row
    if x.device.type != "cpu" or x.shape[0] not in FEW_ROWS or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    y = torch.mm(weight, x.T).T.contiguous()
    return y if bias is None else y.add_(bias)


def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x: [rows, in], weight: [vocab, in]. Returns fp32 [rows, vocab], on CUDA never rounded to less."""
    ops = fused_ops(x.device)
    if ops is None or weight.dtype == torch.float32:
        return linear(x, weight).float()
    if x.shape[0] == 1 and ops.matvec_fits(weight):
        row: torch.Tensor = ops.matvec(x, weight, None, torch.float32)
        return row
    return torch.mm(x, weight.t(), out_dtype=torch.float32)
