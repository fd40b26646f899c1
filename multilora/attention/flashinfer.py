"""Attention for CUDA: FlashInfer's paged prefill, and our own paged decode (`paged.py`).

It owns FlashInfer's wrapper and workspace. One plan per step serves all layers. FlashInfer's kernels are compiled
once on a machine, which takes minutes: a start waits for that, or lets Triton's serve meanwhile (`fallback.py`).
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from flashinfer.jit import env as jit_env
from flashinfer.jit import get_batch_prefill_uri
from flashinfer.prefill import get_batch_prefill_module
from flashinfer.utils import determine_attention_backend

from multilora.attention.base import AttentionShape, KVViews
from multilora.attention.fallback import BackgroundBuild, FallbackPrefill
from multilora.attention.paged import KV, PagedBackend, PagedShape, Prefill, View, pinned
from multilora.attention.triton_attention import TritonPrefill

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

    def __init__(
        self, kv_views: KVViews, shape: AttentionShape, dtype: torch.dtype | None = None, *, wait: bool = True
    ):
        """dtype: of the queries; None: that of the pages. wait: for kernels that this machine has not compiled yet;
        else prompts go through Triton's until they are."""
        super().__init__(kv_views, shape, dtype, functools.partial(_make_prefill, wait=wait))
        falls_back = any(isinstance(prefill, FallbackPrefill) for prefill in self._prefills)
        self.name = "flashinfer" + " (triton until its kernels are compiled)" * falls_back


def _make_prefill(shape: PagedShape, view: View, *, wait: bool) -> Prefill:
    prefill = _FlashInferPrefill(shape, view)
    compiled = _is_compiled(shape)
    if not (compiled or wait):
        return FallbackPrefill(prefill, TritonPrefill(shape, view), _build(shape.device, *_kernels(shape)))
    if not compiled:
        logger.info("compiling attention kernels, once (one to three minutes)")
    prefill.compile()
    return prefill


@functools.cache
def _build(device: torch.device, *kernels: Any) -> BackgroundBuild:
    """Build the kernels that `plan` will ask for, once in this process. FlashInfer keeps them, and locks their files:
    of several processes one compiles."""

    def build() -> None:
        dtype, kv_dtype = kernels[:2]
        backend = determine_attention_backend(device, 0, False, False, dtype, kv_dtype)
        get_batch_prefill_module(backend, *kernels)

    return BackgroundBuild("FlashInfer's kernels", build)


def _kernels(shape: PagedShape) -> tuple[Any, ...]:
    """By what FlashInfer knows the kernels of a plan: dtypes of queries, pages, results and indices, sizes of heads,
    no rotation, whether there is a window, no softcap, sums in fp32."""
    kind, dim = shape.dtype, shape.head_dim
    return (kind, shape.kv_dtype, kind, torch.int32, dim, dim, 0, shape.sliding_window is not None, False, False)


def _is_compiled(shape: PagedShape) -> bool:
    names = [get_batch_prefill_uri(backend, *_kernels(shape)) for backend in ("fa2", "fa3")]
    return any(any(jit_env.FLASHINFER_JIT_DIR.glob(f"{name}*/*.so")) for name in names)
