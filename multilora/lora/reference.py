"""The executable specification of LoRA: what every backend must compute, written to be read.

Slow on purpose: one segment, one adapter, one slice at a time, in float32 (float64 for float64).
"""

import torch

from multilora.batch import LoraSegment
from multilora.lora.base import Activation
from multilora.lora.table import LoraTable, Piece


class ReferenceLora:
    """The contract of `lora/base.py`, as a loop."""

    name = "reference"
    replayable = False

    def __init__(self, table: LoraTable):
        self._table = table
        self._segments: tuple[LoraSegment, ...] = ()

    def prepare(self, segments: tuple[LoraSegment, ...], num_rows: int) -> None:  # noqa: ARG002 (the contract's)
        self._segments = segments

    def begin(self) -> None: ...

    def apply(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        for segment in self._segments:
            rows = slice(segment.start, segment.end)
            for slot, weight in zip(segment.slots, segment.weights, strict=True):
                weights = self._table.site(slot, site)
                if weights is None:
                    continue
                a = gather(weights.a, weights.rank, x.shape[1], self._table.weights)
                for part in weights.b:
                    columns = slice(part.offset, part.offset + part.width)
                    total = y[rows, columns].to(a.dtype)
                    if part.rank:
                        h = x[rows].to(a.dtype) @ a[part.first : part.first + part.rank].T  # [rows, rank]
                        total += weight * (h @ gather(part.pieces, part.rank, part.width, a))
                    if part.scale_shift:
                        scale, shift = gather(part.scale_shift, 2, part.width, a)
                        total = scale * total + shift
                    y[rows, columns] = total.to(y.dtype)

    def apply_gated(self, y: torch.Tensor, x: torch.Tensor, site: int, silu_and_mul: Activation) -> torch.Tensor:
        self.apply(y, x, site)
        return silu_and_mul(y)


def gather(pieces: tuple[Piece, ...], rank: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """The whole matrix [rank, width] from its pieces, in at least float32 (float64 if `like` is)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    matrix = torch.zeros(rank, width, dtype=dtype, device=like.device)
    for piece in pieces:
        r, c = piece.weight.shape
        matrix[piece.row : piece.row + r, piece.col : piece.col + c] = piece.weight
    return matrix
