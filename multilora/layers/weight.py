"""How the weight of a linear layer is stored and multiplied with. A quantised format is one more class here.

The tensors of a weight are allocated once and filled in place, so that CUDA graphs captured over them stay valid.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from multilora.layers.matmul import linear


class Weight(nn.Module, ABC):
    """The contract: a matrix W [out, in] that may be stored in another form than it has in the arithmetic.

    What it is stored in are parameters of the module, which is how the bytes of a model are counted.
    """

    @abstractmethod
    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x: [rows, in], bias: [out]. Returns x Wᵀ + bias, [rows, out], contiguous, in the dtype of x."""

    @abstractmethod
    def dequantised(self, rows: slice) -> torch.Tensor:
        """These rows of W in a floating-point dtype, [rows, in]; may share memory with the weight, so read-only."""

    @abstractmethod
    def load(self, rows: slice, tensor: torch.Tensor) -> None:
        """Fill these rows of W from a checkpoint's tensor, [rows, in], converting it to the stored form."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic, which x has too."""


class PlainWeight(Weight):
    """W as one tensor of the model's dtype: fp32, bf16 or fp16."""

    def __init__(self, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__()
        data = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self.data = nn.Parameter(data, requires_grad=False)  # [out, in]

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, self.data, bias)

    def dequantised(self, rows: slice) -> torch.Tensor:
        return self.data[rows]

    def load(self, rows: slice, tensor: torch.Tensor) -> None:
        self.data[rows].copy_(tensor)
