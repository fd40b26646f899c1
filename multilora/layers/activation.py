"""The gated activation of the Llama family."""

import torch
import torch.nn.functional as F
from torch import nn

from multilora.layers.ops import small_ops


class SiluAndMul(nn.Module):
    """silu(gate) · up."""

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up: [tokens, 2 · width], gate first. Returns [tokens, width]."""
        ops = small_ops(gate_up.device, gate_up.dtype)
        if ops is not None:
            y: torch.Tensor = ops.silu_and_mul(gate_up)
            return y
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
