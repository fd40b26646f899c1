"""LoRA in plain PyTorch: any device, any dtype. The backend of the CPU.

One matmul per contiguous piece and segment. Rows of a segment are neighbours, so nothing is gathered or scattered:
the products are added in place to slices of y.
"""

import torch

from multilora.batch import LoraSegment
from multilora.lora.base import Activation
from multilora.lora.table import LoraTable, SiteWeights


class TorchLora:
    """The contract of `lora/base.py`. The intermediate is rounded to the model's dtype, as PEFT's is."""

    name = "torch"
    replayable = False

    def __init__(self, table: LoraTable):
        self._table = table
        self._segments: tuple[LoraSegment, ...] = ()

    def prepare(self, segments: tuple[LoraSegment, ...], num_rows: int) -> None:  # noqa: ARG002 (the contract's)
        self._segments = segments

    def begin(self) -> None: ...

    def apply(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        for segment in self._segments:
            x_rows, y_rows = x[segment.start : segment.end], y[segment.start : segment.end]
            for slot, weight in zip(segment.slots, segment.weights, strict=True):
                weights = self._table.site(slot, site)
                if weights is not None:
                    expand(y_rows, shrink(x_rows, weights), weights, weight)

    def apply_gated(self, y: torch.Tensor, x: torch.Tensor, site: int, silu_and_mul: Activation) -> torch.Tensor:
        self.apply(y, x, site)
        return silu_and_mul(y)


def shrink(x: torch.Tensor, weights: SiteWeights) -> torch.Tensor:
    """x: [rows, in] → the stacked intermediate [rows, rank]."""
    if weights.rank == 0:
        return x[:, :0]
    first = weights.a[0].weight
    if first.shape == (weights.rank, x.shape[1]):
        return x @ first.T
    h = x.new_zeros(x.shape[0], weights.rank)
    for piece in weights.a:
        rows, columns = piece.weight.shape
        h[:, piece.row : piece.row + rows].addmm_(x[:, piece.col : piece.col + columns], piece.weight.T)
    return h


def expand(y: torch.Tensor, h: torch.Tensor, weights: SiteWeights, weight: float) -> None:
    """y: [rows, out] += weight · h B, slice by slice; then y = scale · y + shift where there is such a pair."""
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
