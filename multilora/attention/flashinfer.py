"""Attention for CUDA: FlashInfer's paged prefill, and our own paged decode (`paged.py`).

It owns FlashInfer's wrapper and workspace. One plan per step serves all layers.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from flashinfer.jit import env as jit_env
from flashinfer.jit import get_batch_prefill_uri

from multilora.attention.base import AttentionShape, KVViews
from multilora.attention.paged import KV, PagedBackend, PagedShape, View, pinned

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 256 << 20  # for FlashInfer


class _FlashInferPrefill:
    """FlashInfer's prefill wrapper: requests of any number of new tokens, causal. FA3 on Hopper, FA2 elsewhere."""

    def __init__(self, shape: PagedShape, view: View):
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=shape.device)
        self._shape = shape
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self._planned = torch.cuda.Event()
        self._options: dict[str, Any] = {
            "sm_scale": shape.scale,
            "window_left": (view.window or 0) - 1,  # FlashInfer counts the token itself out; -1: no window
            "q_data_type": shape.dtype,
            "kv_data_type": shape.kv_dtype,
        }

    def plan(self, q_lens: Sequence[int], requests: np.ndarray, indices: torch.Tensor) -> None:
        """See `Prefill`."""
        s = self._shape
        q_indptr = pinned(np.cumsum([0, *q_lens], dtype=np.int32), s.device)
        indptr = pinned(np.cumsum([0, *requests[3]], dtype=np.int32), s.device)
        self._planned.synchronize()  # the last plan has left the wrapper's one pinned buffer
        self._wrapper.plan(
            q_indptr, indptr, indices, pinned(requests[4] + 1, s.device), s.num_heads, s.num_kv_heads, s.head_dim,
            s.page_size, causal=True, **self._options,
        )  # fmt: skip
        self._planned.record()

    def run(self, q: torch.Tensor, kv: KV, out: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> None:
        """See `Prefill`."""
        assert sinks is None, "flashinfer_obstacle() refuses models with sinks"
        if self._shape.kv_dtype == self._shape.dtype:
            self._wrapper.run(q, kv, out=out)
        else:
            k_scale, v_scale = self._shape.scales_of(layer)
            self._wrapper.run(q, kv, out=out, k_scale=k_scale, v_scale=v_scale)

    def compile(self) -> None:
        """Make FlashInfer load its kernels, which compiles them unless this machine has done so before."""
        s = self._shape
        requests = np.array([[0], [0], [0], [-(-2 // s.page_size)], [1 % s.page_size]], np.int32)
        self.plan([2], requests, torch.zeros(int(requests[3, 0]), dtype=torch.int32, device=s.device))


class FlashInferAttention(PagedBackend):
    """The `flashinfer` backend: fp16 or bf16, head_dim 64, 128 or 256, layers alike (see `flashinfer_obstacle`)."""

    name = "flashinfer"

    def __init__(self, kv_views: KVViews, shape: AttentionShape, dtype: torch.dtype | None = None):
        """dtype: of the queries; None: that of the pages."""
        super().__init__(kv_views, shape, dtype, _FlashInferPrefill)
        if not _is_compiled(self.shape):
            logger.info("compiling attention kernels, once (one to three minutes)")
        for prefill in self._prefills:
            assert isinstance(prefill, _FlashInferPrefill)
            prefill.compile()


def _is_compiled(shape: PagedShape) -> bool:
    kind, kv_kind, dim = shape.dtype, shape.kv_dtype, shape.head_dim
    names = [
        get_batch_prefill_uri(
            backend, kind, kv_kind, kind, torch.int32, dim, dim, 0, shape.sliding_window is not None, False, False
        )
        for backend in ("fa2", "fa3")
    ]
    return any(any(jit_env.FLASHINFER_JIT_DIR.glob(f"{name}*/*.so")) for name in names)
