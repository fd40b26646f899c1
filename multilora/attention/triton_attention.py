"""Attention for CUDA by Triton kernels alone: what FlashInfer does not serve, and GPUs without a CUDA compiler.

Layers may see differently far, scores may have a softcap or sinks, heads may have any size up to 256, numbers any
floating-point dtype. Decodes are those of the `flashinfer` backend (`paged.py`).
"""

from collections.abc import Sequence

import numpy as np
import torch

from multilora.attention.base import AttentionShape, KVViews
from multilora.attention.paged import KV, PagedBackend, PagedShape, View, pinned
from multilora.attention.triton_prefill import blocks_of, prefill, rows_of


class TritonPrefill:
    """The requests of several new tokens in one view, by `triton_prefill.py`."""

    def __init__(self, shape: PagedShape, view: View):
        self._shape, self._view = shape, view
        self._indices = self._blocks = torch.empty(0)

    def plan(self, q_lens: Sequence[int], requests: np.ndarray, indices: torch.Tensor) -> None:
        """See `Prefill`."""
        shape = self._shape
        blocks = pinned(blocks_of(q_lens, requests, shape.page_size, rows_of(shape.dtype)), shape.device)
        self._blocks, self._indices = blocks.to(shape.device, non_blocking=True), indices

    def run(self, q: torch.Tensor, kv: KV, out: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> None:
        """See `Prefill`."""
        shape = self._shape
        k_scale, v_scale = shape.scales_of(layer)
        scale, window = shape.scale * k_scale, self._view.window
        prefill(
            q, kv, self._indices, self._blocks, out, scale, v_scale, window=window, softcap=shape.softcap, sinks=sinks
        )


class TritonAttention(PagedBackend):
    """The `triton` backend: see `triton_obstacle` for what it takes."""

    name = "triton"

    def __init__(self, kv_views: KVViews, shape: AttentionShape, dtype: torch.dtype | None = None):
        """dtype: of the queries; None: that of the pages."""
        super().__init__(kv_views, shape, dtype, TritonPrefill)
