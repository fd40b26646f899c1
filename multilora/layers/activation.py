"""The gated activation of the Llama family."""

import torch
import torch.nn.functional as F


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up. gate_up: [tokens, 2 · width], gate first. Returns [tokens, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
