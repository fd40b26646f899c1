"""A context for tests of single layers: no attention, no adapters."""

import torch

from multilora.attention.rotate import CosSin
from multilora.layers.context import ForwardContext


class NoAttention:
    """Must not be asked."""

    def forward(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rope: CosSin,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        raise AssertionError("no attention in this test")


BASE = ForwardContext(NoAttention(), None)
