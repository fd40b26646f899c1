"""The contract of a LoRA backend.

Called by `engine/runner.py` (prepare, once a step) and `layers/linear.py` (apply, once a site).
Whatever the backend, the answer is that of `reference.py`.
"""

from typing import Protocol

import torch

from multilora.batch import LoraSegment


class LoraBackend(Protocol):
    name: str

    def prepare(self, segments: tuple[LoraSegment, ...], num_rows: int) -> None:
        """Take this step's segments over `num_rows` rows. Not called when there are none."""

    def apply(self, y: torch.Tensor, x: torch.Tensor, site: int) -> None:
        """In place, for every segment and each of its blocks of weight w: y[rows] += w · (x[rows] Aᵀ) B.

        x: [rows, in_features], y: [rows, out_features] of that site, both contiguous, in the model's dtype.
        """
