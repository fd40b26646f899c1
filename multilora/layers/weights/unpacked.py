"""Integers of a checkpoint that are dequantised while they are loaded, and held as plain weights are.

Called by `integer_format.py`.
"""

import torch

from multilora.layers.weights.base import Share, Stored
from multilora.layers.weights.integers import IncompleteMatrices, IntegerLayout
from multilora.layers.weights.plain import PlainExperts, PlainWeight


class _Unpacking(PlainWeight):
    """W as a tensor of the model's dtype, which is filled a matrix at a time."""

    _layout: IntegerLayout
    _incomplete: IncompleteMatrices

    def tensors(self, rows: slice, share: Share) -> dict[str, Stored]:
        return self._incomplete.expect(rows.indices(len(self.data))[0], share)

    def load(self, rows: slice, name: str, tensor: torch.Tensor) -> None:
        start, stop, _ = rows.indices(len(self.data))
        found = self._incomplete.add(start, stop - start, name, tensor, self.data.device)
        if found is not None:
            self.data[start:stop].copy_(found.dequantised())


class UnpackedWeight(_Unpacking):
    """That of a linear layer."""

    def __init__(
        self, layout: IntegerLayout, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype
    ):
        super().__init__(out_features, in_features, device=device, dtype=dtype)
        self._layout, self._incomplete = layout, IncompleteMatrices(layout, in_features)


class UnpackedExperts(_Unpacking, PlainExperts):
    """Those of a mixture's experts, [height, in_features] each."""

    def __init__(
        self,
        layout: IntegerLayout,
        experts: int,
        height: int,
        in_features: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ):
        super().__init__(experts, height, in_features, device=device, dtype=dtype)
        self._layout, self._incomplete = layout, IncompleteMatrices(layout, in_features)
