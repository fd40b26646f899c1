"""The gated MLP of the Llama family."""

from functools import partial
from typing import Any

import torch
from torch import nn

from multilora.distributed.group import Group
from multilora.layers.context import ForwardContext
from multilora.layers.linear import GateUp, Linear
from multilora.layers.weights.plain import PLAIN_FORMATS, WeightFormats
from multilora.lora.sites import DeclaredModules, Shard, target


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)), gate and up merged. path: of the module, inside its decoder layer."""

    def __init__(
        self,
        path: str,
        hidden: int,
        inner: int,
        layer: int,
        declared: DeclaredModules,
        group: Group,
        *,
        bias: bool = False,
        prefix: str = "",
        weights: WeightFormats = PLAIN_FORMATS,
        **kind: Any,
    ):
        """prefix: what precedes the names of its modules among the targets, where others of the layer have these."""
        super().__init__()
        behind = partial(target, before_kv=False, bias=bias, prefix=prefix)
        column, row = partial(behind, shard=Shard.COLUMN), partial(behind, shard=Shard.ROW)
        gate, up = column(f"{path}.gate_proj", inner), column(f"{path}.up_proj", inner)
        gate_up = declared.site(layer, "gate_up_proj", hidden, gate, up)
        down = declared.site(layer, "down_proj", inner, row(f"{path}.down_proj", hidden))
        self.gate_up_proj = GateUp(gate_up, group=group, formats=weights.of_site(gate_up), **kind)
        self.down_proj = Linear(down, group=group, formats=weights.of_site(down), **kind)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """x: [tokens, hidden]. Returns the same shape."""
        y: torch.Tensor = self.down_proj(self.gate_up_proj(x, ctx), ctx)
        return y
