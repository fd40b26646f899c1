"""A context for tests of single layers: no attention, no adapters."""

import torch

from multilora.attention.rotate import CosSin
from multilora.batch import AttentionMeta
from multilora.layers.context import ForwardContext


class NoAttention:
    """Must not be asked."""

    name = "none"

    def prepare(self, meta: AttentionMeta) -> None: ...

    def forward(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: CosSin) -> torch.Tensor:
        raise AssertionError("no attention in this test")

    def for_graph(self, size: int) -> None:
        return None


BASE = ForwardContext(NoAttention(), None)
