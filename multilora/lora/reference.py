"""The executable specification of LoRA: what every backend must compute, written to be read.

It is slow on purpose: one segment, one adapter and one slice at a time, in float32 (float64 for float64).
"""

import torch

from multilora.lora.segment_loop import SegmentLoop
from multilora.lora.table import Piece, SiteWeights


class ReferenceLora(SegmentLoop):
    """The contract of `base.py` by its formula, without any shortcut."""

    name = "reference"

    def add(self, y: torch.Tensor, x: torch.Tensor, weights: SiteWeights, factor: float) -> None:
        """See `SegmentLoop`."""
        a = gather(weights.a, weights.rank, x.shape[1], self.table.weights)
        for part in weights.b:
            columns = slice(part.offset, part.offset + part.width)
            total = y[:, columns].to(a.dtype)
            if part.rank:
                h = x.to(a.dtype) @ a[part.first : part.first + part.rank].T  # [rows, rank]
                total += factor * (h @ gather(part.pieces, part.rank, part.width, a))
            if part.scale_shift:
                scale, shift = gather(part.scale_shift, 2, part.width, a)
                total = scale * total + shift
            y[:, columns] = total.to(y.dtype)


def gather(pieces: tuple[Piece, ...], rank: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """A matrix [rank, width] from its pieces, in at least float32 (float64 if `like` is)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    matrix = torch.zeros(rank, width, dtype=dtype, device=like.device)
    for piece in pieces:
        r, c = piece.weight.shape
        matrix[piece.row : piece.row + r, piece.col : piece.col + c] = piece.weight
    return matrix
