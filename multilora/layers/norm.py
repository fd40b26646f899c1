"""Root-mean-square normalization, computed in fp32 as transformers does."""

import torch
from torch import nn


class RMSNorm(nn.Module):
    """y = x / rms(x) · weight over the last dimension."""

    def __init__(self, size: int, eps: float, *, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., size]."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual): what every half of a decoder layer starts with. None counts as 0."""
        total = x if residual is None else x + residual
        return self(total), total
