"""Rotary position embedding: a table of cos and sin. The attention backend rotates (`attention/rotate.py`).

Knows the frequencies only as numbers; `models/config.py` derives them from the checkpoint's scaling rule.
"""

from dataclasses import dataclass

import torch
from torch import nn

from multilora.attention.rotate import CosSin


@dataclass(frozen=True)
class Rope:
    """What a scaling rule comes down to. `scale` multiplies cos and sin (YaRN's attention factor, else 1)."""

    inv_freq: tuple[float, ...]  # [head_dim / 2]
    scale: float = 1.0


class Rotary(nn.Module):
    """cos and sin in fp32 for every position up to the context length."""

    cos: torch.Tensor  # [context, 1, head_dim / 2]
    sin: torch.Tensor

    def __init__(self, rope: Rope, context_length: int, device: torch.device):
        super().__init__()
        positions = torch.arange(context_length, dtype=torch.float32)
        angles = torch.outer(positions, torch.tensor(rope.inv_freq, dtype=torch.float32))[:, None, :]
        self.register_buffer("cos", (angles.cos() * rope.scale).to(device), persistent=False)
        self.register_buffer("sin", (angles.sin() * rope.scale).to(device), persistent=False)

    def forward(self, positions: torch.Tensor) -> CosSin:
        """cos and sin of these positions, each [tokens, 1, head_dim / 2]; looked up once a step for all layers."""
        return self.cos[positions], self.sin[positions]
