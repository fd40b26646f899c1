"""The contract of a LoRA backend.

Called by `engine/execution/runner.py` (prepare, once a step) and `layers/linear.py` (apply or apply_gated, once a
site).
Whatever the backend, the answer is that of `reference.py`.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from multilora.batch import LoraSegment

Activation = Callable[[torch.Tensor], torch.Tensor]


class LoraBackend(Protocol):
    name: str
    replayable: bool
    """Whether a graph captured over as many rows may be replayed for the step last prepared."""

    def prepare(self, segments: tuple[LoraSegment, ...], num_rows: int) -> None:
        """Take this step's segments over `num_rows` rows. None of them: only before a graph is captured."""

    def begin(self) -> None:
        """What `apply` will be given as x is there (or queued): called before the layer's own product, so that a part
        of the work may run beside it. Not calling it costs only that.
        """

    def apply(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        """In place, for every segment and each of its adapters of weight w: y[rows] += w · (x[rows] Aᵀ) B; then, if
        its one adapter has a scale-shift pair at the site, y[rows] = scale · y[rows] + shift.

        x: [rows, in_features], y: [rows, out_features] of that site, both contiguous, in the model's dtype; y may be
        fp32 (logits). Adapters with scale-shift pairs are never composed.
        """

    def apply_gated(self, y: torch.Tensor, x: torch.Tensor, site: int, silu_and_mul: Activation) -> torch.Tensor:
        """apply(y, x, site), then silu_and_mul(y): silu(gate) · up of y's two halves, the site's two slices. A
        backend may do both in one pass, to the same bits; y is worth nothing afterwards.

        Returns [rows, out_features / 2].
        """
