"""The experts of a mixture in 4 bits that stay packed: AWQ, GPTQ and compressed-tensors.

`int4_grouped.py` multiplies. What checkpoints hold in other layouts is repacked while it is loaded, a matrix at a
time; what cannot stay packed is held dequantised (`unpacked.py`). Called by `integer_format.py`.
"""

import torch
from torch import nn

from multilora.batch import ExpertRows
from multilora.layers.matmul import linear
from multilora.layers.weights import int4_grouped as arithmetic
from multilora.layers.weights.base import ExpertsWeight, Share, Stored
from multilora.layers.weights.integers import GroupedIntegers, IncompleteMatrices, IntegerLayout
from multilora.layers.weights.plain import NOISE


class Int4Experts(ExpertsWeight):
    """Packed numbers, and for each output and group of inputs a scale and a zero, in bf16.

    The zeros of checkpoints are whole numbers below 16, so that of what they hold scales alone are rounded.
    """

    def __init__(self, layout: IntegerLayout, experts: int, height: int, in_features: int, *, device: torch.device):
        """layout: in which the inputs of a group are neighbours; see `int4_grouped.obstacle`, too."""
        super().__init__()
        self._layout = layout
        self.experts, self.height, self.width = experts, height, in_features
        self._incomplete = IncompleteMatrices(layout, in_features)
        packed = torch.empty(experts * height, in_features // 2, dtype=torch.uint8, device=device)
        groups = in_features // (layout.group or in_features)
        scales = torch.zeros(experts, groups, height, 2, dtype=torch.bfloat16, device=device)
        self.packed = nn.Parameter(packed, requires_grad=False)  # [experts · out, in / 2]
        self.scales = nn.Parameter(scales, requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def capturable(self) -> bool:
        return self.packed.device.type == "cuda"

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, self.dequantised(slice(None)), bias)

    def grouped_matmul(self, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        packed = self.packed.unflatten(0, (self.experts, self.height))
        return arithmetic.grouped_product(x, packed, self.scales, rows.ends)

    def dequantised(self, rows: slice) -> torch.Tensor:
        scales = self.scales.transpose(0, 1).flatten(1, 2)  # [groups, experts · out, 2]
        return arithmetic.dequantise(self.packed[rows], scales[:, rows])

    def tensors(self, rows: slice, share: Share) -> dict[str, Stored]:  # noqa: ARG002 - the contract's
        assert share.is_whole, "ranks divide experts"
        return self._layout.stored(share)

    def load(self, rows: slice, name: str, tensor: torch.Tensor) -> None:
        found = self._incomplete.add(rows.start, rows.stop - rows.start, name, tensor, self.scales.device)
        if found is not None:
            self._fill(rows, found)

    def randomise(self, generator: torch.Generator) -> None:
        self.packed.random_(generator=generator)
        self.scales[..., 0], self.scales[..., 1] = NOISE / 4.6, 8  # of 0 … 15

    def _fill(self, rows: slice, found: GroupedIntegers) -> None:
        found.check_neighbours(self.width // self.scales.shape[1])
        self.packed[rows] = arithmetic.pack(found.numbers)
        expert, first = divmod(rows.start, self.height)
        own = self.scales[expert, :, first : first + rows.stop - rows.start]
        own[..., 0].copy_(found.scales.T)
        own[..., 1].copy_(found.zeros.T)
