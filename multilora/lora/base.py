"""The contract of a LoRA backend. What a backend must compute is written out in `reference.py`.

The runner calls `prepare` once a step, the linear layers call the rest once a site.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from multilora.batch import ExpertRows, LoraSegment

Activation = Callable[[torch.Tensor], torch.Tensor]


class LoraBackend(Protocol):
    """Adds the adapters of a step to the outputs of the model's linear layers."""

    name: str
    replayable: bool
    """Whether a graph captured over the same number of rows may be replayed for the step prepared last."""

    def prepare(
        self, segments: tuple[LoraSegment, ...], num_rows: int, *, captured: bool = False, decodes: bool = False
    ) -> None:
        """Take this step's segments over `num_rows` rows. captured: for a graph of so many rows, to be captured or
        replayed, so that nothing that is launched may depend on the segments, where that can be. An empty tuple
        stands for any adapters: it precedes a capture. Of captured steps, the one with the most rows comes first.
        decodes: every request of a captured step has one row."""

    def begin(self) -> None:
        """Say that the x of the next `apply` is ready, or queued on the current stream. The layer calls this before
        its own product, so that a part of the LoRA work may run beside it; the call is optional."""

    def apply(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        """In place, for every segment and each of its adapters of weight w: y[rows] += w · (x[rows] Aᵀ) B; then, if
        its one adapter has a scale-shift pair at the site, y[rows] = scale · y[rows] + shift.

        x: [rows, in_features], y: [rows, out_features] of that site, both contiguous, in the model's dtype; y may be
        fp32 (logits). Adapters with scale-shift pairs are never composed.
        """

    def expert_segments(self) -> torch.Tensor | None:
        """Which of this step's segments each row belongs to, int64 [rows]: from 1 on, 0: none. None: no adapter of
        the step acts on experts. The values may change from one replay of a graph to the next."""

    def apply_experts(self, y: torch.Tensor, x: torch.Tensor, site: int, rows: ExpertRows) -> None:
        """`apply` at a site of experts, for the rows that `rows` describes: each with the weights that its adapters
        have for its expert. No adapter has a scale-shift pair there. rows.segments: what `expert_segments` said.
        """

    def apply_gated(self, y: torch.Tensor, x: torch.Tensor, site: int, silu_and_mul: Activation) -> torch.Tensor:
        """apply(y, x, site), then silu_and_mul(y): silu(gate) · up of y's two halves, which are the site's two
        slices. A backend may fuse the two, to the same bits; the contents of y are undefined afterwards.

        Returns [rows, out_features / 2].
        """
