"""Weights in bf16 on a CPU, in the order in which oneDNN multiplies with them.

Without it oneDNN copies W into that order in every product, which for the few rows of a decode step takes half as
long as the arithmetic (docs/log.md). W is held once: it is reordered by the first product after it was filled, and
what it was filled into gives its memory back.
"""

import functools

import torch

from multilora.layers.weights.plain import PlainWeight

ROWS = 512
"""For so many rows the order is chosen: of 1, 16 and 512 the one that is never slower than W as it was."""


@functools.cache
def reorders(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of this dtype on this device have an order of their own: bf16 where the CPU multiplies it."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    known = all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return known and bool(ops._is_mkldnn_bf16_supported())  # noqa: SLF001 - torch has no public name for these


class OneDnnWeight(PlainWeight):
    """W in oneDNN's order once it has been multiplied with; `data` is empty from then on."""

    _packed: torch.Tensor | None = None

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if len(x) == 0:
            return x.new_empty(0, self.data.shape[0])
        if self._packed is None:
            reordered: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(self.data.detach(), ROWS)  # noqa: SLF001
            self._packed = reordered
            self.data.untyped_storage().resize_(0)
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")  # noqa: SLF001
        return y

    def dequantised(self, rows: slice) -> torch.Tensor:
        return super().dequantised(rows) if self._packed is None else self._packed.to_dense()[rows]

    def load(self, rows: slice, name: str, tensor: torch.Tensor) -> None:
        if self._packed is not None:
            packed = self._packed
            self.drop()
            self.data.copy_(packed.to_dense())
        super().load(rows, name, tensor)

    def randomise(self, generator: torch.Generator) -> None:
        self.drop()
        super().randomise(generator)

    def drop(self) -> None:
        self._packed = None
        size = self.data.numel() * self.data.element_size()
        if self.data.untyped_storage().nbytes() < size:
            self.data.untyped_storage().resize_(size)
