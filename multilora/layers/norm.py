"""Root-mean-square normalization, computed in fp32 as transformers does.

Ranks of a group hand their shares of a half layer's output to the norm behind it, which sums them.
"""

from enum import Enum

import torch
from torch import nn

from multilora.distributed.group import SINGLE, Group
from multilora.layers.context import ForwardContext
from multilora.layers.ops import small_ops
from multilora.lora.sites import NormModule


class NormForm(Enum):
    """Where a family of models rounds to 16 bit, and what its weight is."""

    ROUNDED = "rounded"  # weight · round(x / rms(x)): Llama, Qwen
    WIDE = "wide"  # round(weight · x / rms(x)): OLMo 2, gpt-oss
    ONE_PLUS = "one plus"  # round((1 + weight) · x / rms(x)): Gemma


class RMSNorm(nn.Module):
    """y = x / rms(x) · weight over the last dimension."""

    def __init__(
        self,
        norm: NormModule,
        eps: float,
        *,
        device: torch.device,
        dtype: torch.dtype,
        group: Group = SINGLE,
        form: NormForm = NormForm.ROUNDED,
    ):
        """norm: the declaration by which adapters that replace the weight find it; group: see `add`."""
        super().__init__()
        self.norm = norm
        self.eps = eps
        self.form = form
        self.group = group
        self._fused = small_ops(device, dtype)
        self.weight = nn.Parameter(torch.empty(norm.size, device=device, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """x: [rows, size] or [rows, heads, size]."""
        if self._fused is not None:
            y = self._fused.rms_norm(x, self.weight, self.eps, self.form)
        else:
            y = rms_norm(x, self.weight, self.eps, self.form)
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
        if exchange is not None and self.form is NormForm.ROUNDED and exchange.fits(x):
            from multilora.layers.triton_sum_norm import sum_add_rms_norm

            y, total = sum_add_rms_norm(x, residual, self.weight, self.eps, exchange)
            return self._replace(y, total, ctx), total
        x = self.group.all_reduce(x)
        if self._fused is None:
            total = x + residual
            return self(total, ctx), total
        y, total = self._fused.add_rms_norm(x, residual, self.weight, self.eps, self.form)
        return self._replace(y, total, ctx), total

    def _replace(self, y: torch.Tensor, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """y with the rows of adapters that bring their own weight computed by that."""
        if ctx.full_weights is not None:
            for rows, weights in ctx.full_weights.find(self.norm.layer, self.norm.module):
                y[rows] = rms_norm(x[rows], weights.pieces[0].weight[0], self.eps, self.form)
        return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, form: NormForm = NormForm.ROUNDED) -> torch.Tensor:
    """x: [..., size], weight: [size]."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form is NormForm.ROUNDED:
        return weight * normed.to(x.dtype)
    gain = weight.float() + 1 if form is NormForm.ONE_PLUS else weight.float()
    return (gain * normed).to(x.dtype)
