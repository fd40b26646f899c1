"""Weights of 4 bits that stay packed: AWQ, GPTQ and compressed-tensors where the device multiplies with them.

`int4_arithmetic.py` multiplies. What checkpoints hold in other layouts is repacked while it is loaded, a matrix at a
time; what cannot stay packed is held dequantised (`unpacked.py`).
"""

from dataclasses import replace

import torch
from torch import nn

from multilora.layers.weights import int4_arithmetic as arithmetic
from multilora.layers.weights.base import Share, Stored, Weight
from multilora.layers.weights.integers import GroupedIntegers, IncompleteMatrices, IntegerLayout
from multilora.layers.weights.plain import NOISE


class Int4Weight(Weight):
    """W as packed numbers and, for each output and group of inputs, a scale and a zero in bf16.

    order: where groups are not neighbours (GPTQ's `desc_act`), the inputs, group after group: x is put into that
    order before the product. A weight with an order has one matrix only.
    """

    def __init__(self, layout: IntegerLayout, out_features: int, in_features: int, *, device: torch.device):
        super().__init__()
        self._layout, self._shape = layout, (out_features, in_features)
        self._group = layout.group or in_features
        self._incomplete = IncompleteMatrices(layout, in_features)
        scales = torch.zeros(in_features // self._group, out_features, 2, dtype=torch.bfloat16, device=device)
        self.packed = nn.Parameter(arithmetic.packed_like(out_features, in_features, device), requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.order: nn.Parameter | None = None
        if layout.any_order:
            order = torch.arange(in_features, device=device)
            self.order = nn.Parameter(order, requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.order is not None:
            x = x[:, self.order]
        y = arithmetic.product(x, self.packed, self._group, self.scales)
        return y if bias is None else y + bias

    def dequantised(self, rows: slice) -> torch.Tensor:
        whole = arithmetic.dequantise(self.packed, self._group, self.scales)[rows]
        return whole if self.order is None else whole[:, self.order.argsort()]

    def tensors(self, rows: slice, share: Share) -> dict[str, Stored]:
        return self._incomplete.expect(rows.indices(self._shape[0])[0], share)

    def load(self, rows: slice, name: str, tensor: torch.Tensor) -> None:
        start, stop, _ = rows.indices(self._shape[0])
        found = self._incomplete.add(start, stop - start, name, tensor, self.scales.device)
        if found is not None:
            self._fill(start, stop, found)

    def randomise(self, generator: torch.Generator) -> None:
        device, (outs, width) = self.scales.device, self._shape
        numbers = torch.randint(0, 16, (outs, width), dtype=torch.int32, device=device, generator=generator)
        self.packed.copy_(arithmetic.pack(numbers))
        self.scales[..., 0], self.scales[..., 1] = NOISE / 4.6, NOISE / 9.2  # of 0 … 15, less 7.5

    def _fill(self, start: int, stop: int, found: GroupedIntegers) -> None:
        if self.order is not None:
            order = found.group.argsort(stable=True)
            found = replace(found, numbers=found.numbers[:, order], group=found.group[order])
            self.order.copy_(order)
        found.check_neighbours(self._group)
        packed = arithmetic.pack(found.numbers.int().contiguous())
        first = start * len(self.packed) // self._shape[0]
        self.packed[first : first + len(packed)].copy_(packed)
        self.scales[:, start:stop, 0].copy_(found.scales.T)
        self.scales[:, start:stop, 1].copy_(((8 - found.zeros).float() * found.scales).T)
