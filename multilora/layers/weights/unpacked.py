"""Integers of a checkpoint that are dequantised while they are loaded, and held as plain weights are."""

import torch

from multilora.layers.weights.base import Share, Stored
from multilora.layers.weights.integers import IncompleteMatrices, IntegerLayout
from multilora.layers.weights.plain import PlainWeight


class UnpackedWeight(PlainWeight):
    """W as a tensor of the model's dtype, which is filled a matrix at a time."""

    def __init__(
        self, layout: IntegerLayout, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype
    ):
        super().__init__(out_features, in_features, device=device, dtype=dtype)
        self._layout = layout
        self._incomplete = IncompleteMatrices(layout, in_features)

    def tensors(self, rows: slice, share: Share) -> dict[str, Stored]:  # noqa: ARG002 - the contract's
        assert share.is_whole, "ranks are refused"
        return self._layout.stored(share.out_features, share.in_features)

    def load(self, rows: slice, name: str, tensor: torch.Tensor) -> None:
        start, stop, _ = rows.indices(len(self.data))
        found = self._incomplete.add(start, stop - start, name, tensor, self.data.device)
        if found is not None:
            self.data[start:stop].copy_(found.dequantised())
