"""LoRA in plain PyTorch, for any device and dtype: the backend of the CPU.

There is one matmul per segment and contiguous piece of a matrix. The rows of a segment are neighbours, so nothing is
gathered or scattered: the products are added in place to slices of y.
"""

import torch

from multilora.lora.segment_loop import SegmentLoop
from multilora.lora.table import SiteWeights


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
    for part in weights.b:
        for piece in part.pieces:
            rows, columns = piece.weight.shape
            row, col = part.first + piece.row, part.offset + piece.col
            own = piece.weight.to(y.dtype)  # logits are fp32
            y[:, col : col + columns].addmm_(h[:, row : row + rows].to(y.dtype), own, alpha=weight)
        for piece in part.scale_shift:
            columns = piece.weight.shape[1]
            own = y[:, part.offset + piece.col : part.offset + piece.col + columns]
            own.copy_(own * piece.weight[0] + piece.weight[1])
