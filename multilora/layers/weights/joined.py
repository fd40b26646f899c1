"""Several matrices as one weight, each held for itself: for formats that cannot lie below each other in one tensor.

The product is as many products, side by side.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import nn

from multilora.layers.weights.base import Share, Stored, Weight, WeightFormat


def make_weight(
    formats: Sequence[WeightFormat],
    widths: Sequence[int],
    in_features: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Weight:
    """The weight of a layer whose slices have these formats and so many outputs each: one tensor where it can be."""
    first = formats[0]
    if len(widths) == 1 or (all(f is first for f in formats) and first.merges(widths)):
        return first.make(sum(widths), in_features, device=device, dtype=dtype)
    return JoinedWeight(
        [f.make(n, in_features, device=device, dtype=dtype) for f, n in zip(formats, widths, strict=True)], widths
    )


class JoinedWeight(Weight):
    """The weights, and so many outputs each. Rows are asked for by slices that are those of one of them, or all."""

    def __init__(self, weights: Sequence[Weight], widths: Sequence[int]):
        super().__init__()
        self.weights = nn.ModuleList(weights)
        self._parts = list(weights)
        self._rows = [slice(*ends) for ends in pairwise(accumulate(widths, initial=0))]

    @property
    def dtype(self) -> torch.dtype:
        return self._parts[0].dtype

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        biases = [None if bias is None else bias[rows] for rows in self._rows]
        return torch.cat([w.matmul(x, b) for w, b in zip(self._parts, biases, strict=True)], dim=1)

    def dequantised(self, rows: slice) -> torch.Tensor:
        if rows in self._rows:
            return self._at(rows).dequantised(slice(None))
        return torch.cat([w.dequantised(slice(None)) for w in self._parts])[rows]

    def tensors(self, rows: slice, share: Share) -> dict[str, Stored]:
        return self._at(rows).tensors(slice(0, rows.stop - rows.start), share)

    def load(self, rows: slice, name: str, tensor: torch.Tensor) -> None:
        self._at(rows).load(slice(0, rows.stop - rows.start), name, tensor)

    def randomise(self, generator: torch.Generator) -> None:
        for weight in self._parts:
            weight.randomise(generator)

    def drop(self) -> None:
        for weight in self._parts:
            weight.drop()

    def check_filled(self) -> None:
        for weight in self._parts:
            weight.check_filled()

    def _at(self, rows: slice) -> Weight:
        return self._parts[self._rows.index(rows)]
