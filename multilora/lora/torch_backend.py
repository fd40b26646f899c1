"""LoRA in plain PyTorch, for any device and dtype: the backend of the CPU.

There is one matmul per segment and contiguous piece of a matrix. The rows of a segment are neighbours, so nothing is
gathered or scattered: the products are added in place to slices of y.

On CPU a product in 16 bit costs 20 µs and more however small it is (oneDNN), one in fp32 2 to 5, so the few rows of a
decode step take the way through fp32. What is rounded to 16 bit stays the same: the intermediate, and the sum.
"""

import torch

from multilora.lora.segment_loop import SegmentLoop
from multilora.lora.table import SiteWeights

FP32_ROWS = 8
"""Rows up to which 16-bit products go through fp32 on CPU: 2 to 3 times faster at 2, equal at 16 (docs/log.md)."""


class TorchLora(SegmentLoop):
    """The contract of `base.py`. The intermediate is rounded to the model's dtype, as PEFT's is."""

    name = "torch"

    def add(self, y: torch.Tensor, x: torch.Tensor, weights: SiteWeights, factor: float) -> None:
        """See `SegmentLoop`."""
        expand(y, shrink(x, weights), weights, factor)


def shrink(x: torch.Tensor, weights: SiteWeights) -> torch.Tensor:
    """x: [rows, in] → x Aᵀ, the stacked intermediate [rows, rank], in x's dtype."""
    if weights.rank == 0:
        return x[:, :0]
    if _through_fp32(x):
        return shrink(x.float(), weights).to(x.dtype)
    first = weights.a[0].weight
    if first.shape == (weights.rank, x.shape[1]):
        return x @ first.to(x.dtype).T
    h = x.new_zeros(x.shape[0], weights.rank)
    for piece in weights.a:
        rows, columns = piece.weight.shape
        h[:, piece.row : piece.row + rows].addmm_(x[:, piece.col : piece.col + columns], piece.weight.to(x.dtype).T)
    return h


def expand(y: torch.Tensor, h: torch.Tensor, weights: SiteWeights, weight: float) -> None:
    """y += weight · h B, slice by slice, in place; then y = scale · y + shift where a slice has such a pair.

    y: [rows, out]; h: [rows, rank].
    """
    dtype = torch.float32 if _through_fp32(y) else y.dtype  # that of logits is fp32
    h = h.to(dtype)
    for part in weights.b:
        for piece in part.pieces:
            rows, columns = piece.weight.shape
            row, col = part.first + piece.row, part.offset + piece.col
            target, own_h, own = y[:, col : col + columns], h[:, row : row + rows], piece.weight.to(dtype)
            if dtype == y.dtype:
                target.addmm_(own_h, own, alpha=weight)
            else:
                target.add_(own_h @ own, alpha=weight)
        for piece in part.scale_shift:
            columns = piece.weight.shape[1]
            own = y[:, part.offset + piece.col : part.offset + piece.col + columns]
            own.copy_(own * piece.weight[0] + piece.weight[1])


def _through_fp32(rows: torch.Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype.itemsize == 2 and rows.shape[0] <= FP32_ROWS
