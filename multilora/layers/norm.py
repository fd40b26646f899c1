"""Root-mean-square normalization, computed in fp32 as transformers does."""

import torch
from torch import nn

from multilora.layers.ops import fused_ops


class RMSNorm(nn.Module):
    """y = x / rms(x) · weight over the last dimension."""

    def __init__(self, size: int, eps: float, *, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self._fused = fused_ops(device)
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., size]; on CUDA [rows, size] or [rows, heads, size]."""
        if self._fused is not None:
            return self._fused.rms_norm(x, self.weight, self.eps)
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual): what every half of a decoder layer starts with. None counts as 0."""
        if residual is None:
            return self(x), x
        if self._fused is not None:
            return self._fused.add_rms_norm(x, residual, self.weight, self.eps)
        total = x + residual
        return self(total), total
