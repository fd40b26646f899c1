"""Root-mean-square normalization, computed in fp32 as transformers does.

Ranks of a group hand their shares of a half layer's output to the norm behind it, which sums them.
"""

import torch
from torch import nn

from multilora.distributed.group import SINGLE, Group
from multilora.layers.context import ForwardContext
from multilora.layers.ops import fused_ops
from multilora.lora.sites import NormModule


class RMSNorm(nn.Module):
    """y = x / rms(x) · weight over the last dimension."""

    def __init__(
        self, norm: NormModule, eps: float, *, device: torch.device, dtype: torch.dtype, group: Group = SINGLE
    ):
        """norm: the declaration by which adapters that replace the weight find it; group: see `add`."""
        super().__init__()
        self.norm = norm
        self.eps = eps
        self.group = group
        self._fused = fused_ops(device)
        self.weight = nn.Parameter(torch.empty(norm.size, device=device, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """x: [..., size]; on CUDA [rows, size] or [rows, heads, size]."""
        if self._fused is not None:
            y = self._fused.rms_norm(x, self.weight, self.eps)
        else:
            y = rms_norm(x, self.weight, self.eps)
        return self._replace(y, x, ctx)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor | None, ctx: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(Σ x + residual), Σ x + residual): what every half of a decoder layer starts with.

        x: this rank's share of the half before; Σ: over the group. residual None: there is no half before, and x is
        whole.
        """
        if residual is None:
            return self(x, ctx), x
        exchange = self.group.exchange
        if exchange is not None and exchange.fits(x):
            from multilora.layers.triton_sum_norm import sum_add_rms_norm

            y, total = sum_add_rms_norm(x, residual, self.weight, self.eps, exchange)
            return self._replace(y, total, ctx), total
        x = self.group.all_reduce(x)
        if self._fused is None:
            total = x + residual
            return self(total, ctx), total
        y, total = self._fused.add_rms_norm(x, residual, self.weight, self.eps)
        return self._replace(y, total, ctx), total

    def _replace(self, y: torch.Tensor, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """y with the rows of adapters that bring their own weight computed by that."""
        if ctx.full_weights is not None:
            for rows, weights in ctx.full_weights.find(self.norm.layer, self.norm.module):
                y[rows] = rms_norm(x[rows], weights.pieces[0].weight[0], self.eps)
        return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: [..., size], weight: [size]."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)
