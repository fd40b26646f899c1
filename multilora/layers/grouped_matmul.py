"""x Wᵀ where every row has the W of its expert, the way that is fastest on the device for that many rows.

Where there is one kernel for it, nothing is asked of the host; elsewhere one expert comes after the other. Called by
`weights/plain.py` and `models/transformers_backend/tree_experts.py`.
"""

import torch
import torch.nn.functional as F

from multilora.batch import ExpertRows
from multilora.layers.matmul import linear

GROUPED_CAPABILITIES = ((9, 0), (10, 0))
"""Devices whose grouped product is one kernel; on others torch falls back to a loop that waits for the device."""


def has_grouped_product(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch multiplies groups of rows with weights of these widths in one kernel there, without the host."""
    if device.type != "cuda" or dtype != torch.bfloat16 or any(width % 8 for width in widths):
        return False
    return torch.cuda.get_device_capability(device) in GROUPED_CAPABILITIES


def grouped_product(x: torch.Tensor, weight: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
    """x: [rows, in], in the order of `rows`; weight: [experts, out, in]. Returns [rows, out], of which those that
    belong to no expert are of no use."""
    if _few_rows(x, weight):
        from multilora.layers import triton_grouped

        return triton_grouped.grouped_product(x, weight, rows.ends)
    if has_grouped_product(x.device, x.dtype, *weight.shape[1:]):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=rows.ends)
    y = x.new_empty(len(x), weight.shape[1])
    start = 0
    for expert, end in enumerate(rows.ends.tolist()):
        if end > start:
            y[start:end] = linear(x[start:end], weight[expert])
        start = end
    return y


def _few_rows(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether an expert has so few rows, on the average, that reading its weights is all that takes time."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    from multilora.layers import triton_grouped

    return len(x) <= triton_grouped.MOST_ROWS * len(weight)
