"""The contract of an attention backend.

Called by `engine/` (prepare, once a step; what graphs need) and `layers/attention.py` (forward, once a layer).
A backend owns its workspace; the KV pages belong to the arena.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from multilora.attention.rotate import CosSin
from multilora.batch import AttentionMeta

KVViews = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer, k and v of all pages of the arena, each [num_pages, page_size, kv_heads, head_dim], strided."""


@dataclass(frozen=True)
class AttentionShape:
    """What the attention of a model computes. All layers have the same heads and scale.

    softcap: scores s become softcap · tanh(s / softcap) before they are masked (Gemma 2); None: they stay.
    sinks: layers hand over one more score for each head, which takes part in the softmax and has no value (gpt-oss).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # factor of the scores q · k
    sliding_window: int | None  # how many tokens a token sees, itself included; None: all before it
    layer_windows: tuple[int | None, ...] = ()  # the same for each layer, where they differ; empty: they do not
    softcap: float | None = None
    sinks: bool = False
    kv_scales: tuple[tuple[float, float], ...] = ()  # of stored keys and values by layer; empty: 1 (`kv_dtypes.py`)
    layer_columns: tuple[int, ...] = ()  # in which column of the page tables each layer is; empty: there is one

    def scales_of(self, layer: int) -> tuple[float, float]:
        """What the layer's stored keys and values are multiplied with."""
        return self.kv_scales[layer] if self.kv_scales else (1.0, 1.0)

    def column_of(self, layer: int) -> int:
        """The column of the page tables (`AttentionMeta.column`) that the layer's keys and values are in."""
        return self.layer_columns[layer] if self.layer_columns else 0

    def window_of(self, layer: int) -> int | None:
        """How many tokens a token of the layer sees, itself included; None: all before it."""
        return self.layer_windows[layer] if self.layer_windows else self.sliding_window


class LayerAttention(Protocol):
    """The part of a backend that layers call."""

    def forward(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rope: CosSin,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rotate q and k, write k and v of the new tokens into their pages, then attend causally.

        q: [T, heads, head_dim]; k, v: [T, kv_heads, head_dim]; the last dimension lies contiguous.
        Returns [T, heads, head_dim]. Request r's token i sees the request's tokens 0 … kv_len - q_len + i,
        and with a sliding window of w only the last w of them (itself included). sinks: [heads], for models that
        have them (see `AttentionShape`).
        """
        ...


class StepAttention(LayerAttention, Protocol):
    """A backend for one step."""

    def prepare(self, meta: AttentionMeta) -> None:
        """Take this step's page tables and lengths; plan whatever is shared by all layers."""


class GraphAttention(StepAttention, Protocol):
    """What CUDA graphs hold. columns: of the page tables that its layers read."""

    columns: int


class AttentionBackend(StepAttention, Protocol):
    """A backend over the KV pages of one arena. cascades: whether it makes use of `AttentionMeta.shared`."""

    name: str
    cascades: bool

    def for_graph(self, batch_size: int) -> GraphAttention | None:
        """A twin over the same pages whose `forward` can be captured; None if this backend has none.

        The twin takes decode steps of 1 … `batch_size` requests with one new token each; its `forward` always gets
        `batch_size` rows. Rows beyond the requests are padding, which reads and writes no request's pages.
        `prepare` runs before the capture and before every replay, outside the graph.
        """
        ...

    def for_pieces(self, rows: int) -> "PieceAttention | None":
        """A twin for steps of up to `rows` new tokens in which everything but the attention itself is captured;
        None if this backend has none.

        Twins of several sizes share their memory: ask for the largest first, and use one at a time.
        """
        ...


class PieceAttention(Protocol):
    """A backend's `forward` in two halves: `rotate` can be captured, `attend` is called between two graphs."""

    out: torch.Tensor
    """[rows, heads, head_dim], what `attend` writes, always at the same address."""

    def prepare(self, meta: AttentionMeta) -> None:
        """Take a step's page tables and lengths, before its graphs are replayed. Not needed for a capture."""

    def rotate(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rope: CosSin,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Rotate q and k, write k and v to their pages. All of them have `rows` rows; padding writes nothing. sinks
        stay where they are for `attend`."""

    def attend(self, layer: int) -> None:
        """Compute the attention of the step's tokens from what `rotate` left."""
