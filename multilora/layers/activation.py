"""The gated activation of the Llama family."""

import torch
import torch.nn.functional as F
from torch import nn

from multilora.layers.ops import fused_ops


class SiluAndMul(nn.Module):
    """silu(gate) · up."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._fused = fused_ops(device)

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up: [tokens, 2 · width], gate first. Returns [tokens, width]."""
        if self._fused is not None:
            y: torch.Tensor = self._fused.silu_and_mul(gate_up)
            return y
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
