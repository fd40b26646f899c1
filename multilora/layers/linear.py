"""The linear layer of every model, one matrix even where PEFT sees several (q, k and v; gate and up).

The ONE place where LoRA enters. It knows its site, not who uses it: the backend, prepared for this step, does.
Gate and up come out activated, since a backend may add LoRA on the way through the activation.
"""

import torch
from torch import nn

from multilora.layers.activation import SiluAndMul
from multilora.layers.context import ForwardContext
from multilora.layers.matmul import linear
from multilora.lora.full_weights import FullWeightModules, product
from multilora.lora.sites import LoraSite


class Linear(nn.Module):
    """y = x Wᵀ + b, then the step's adapters in place. Shapes come from the site."""

    def __init__(self, site: LoraSite, *, bias: bool, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.site = site
        weight = torch.empty(site.out_features, site.in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)  # [out, in]
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(site.out_features, device=device, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """x: [tokens, in_features], contiguous. Returns [tokens, out_features]."""
        y = self._product(x, ctx)
        if ctx.lora is not None:
            ctx.lora.apply(y, x, self.site.index)
        return y

    def _product(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """What LoRA is added to."""
        if ctx.lora is not None:
            ctx.lora.begin()
        y = linear(x, self.weight, self.bias)
        if ctx.full_weights is not None:
            self._replace(y, x, ctx.full_weights)
        return y

    def _replace(self, y: torch.Tensor, x: torch.Tensor, full_weights: FullWeightModules) -> None:
        """Where an adapter brings the whole weight of a module. (A trained bias comes after that, as a shift.)"""
        for s in self.site.slices:
            columns = slice(s.offset, s.offset + s.out_features)
            for rows, weights in full_weights.find(self.site.layer, s.module):
                y[rows, columns] = product(x[rows], weights)
                if self.bias is not None:
                    y[rows, columns] += self.bias[columns]

    def parts(self) -> dict[str, dict[str, torch.Tensor]]:
        """PEFT's (and the checkpoint's) module name → parameter name → the rows of ours that belong to it."""
        found = {}
        for s in self.site.slices:
            rows = slice(s.offset, s.offset + s.out_features)
            found[s.module] = {name: param[rows] for name, param in self.named_parameters()}
        return found


class GateUp(Linear):
    """silu(gate) · up, where [gate, up] = x Wᵀ + b, then the step's adapters."""

    def __init__(self, site: LoraSite, *, bias: bool, device: torch.device, dtype: torch.dtype):
        super().__init__(site, bias=bias, device=device, dtype=dtype)
        self.silu_and_mul = SiluAndMul(device)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """x: [tokens, in_features], contiguous. Returns [tokens, out_features / 2]."""
        y = self._product(x, ctx)
        if ctx.lora is None:
            return self.silu_and_mul(y)
        return ctx.lora.apply_gated(y, x, self.site.index, self.silu_and_mul)
