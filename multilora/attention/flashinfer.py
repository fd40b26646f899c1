"""Attention by FlashInfer's paged kernels, for CUDA; RoPE and the page write are one kernel of ours before it.

Owns FlashInfer's wrappers and workspace, and the page lists of a step. Requests with one new token go through the
decode wrapper, the others through the prefill wrapper; one plan a step serves all layers. When both kinds meet, the
rotation writes the queries of the decodes first, and one gather brings the results back to the rows' order.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
from flashinfer.jit import env as jit_env
from flashinfer.jit import get_batch_prefill_uri

from multilora.attention.base import AttentionBackend
from multilora.attention.rotate import CosSin
from multilora.attention.torch_sdpa import KVViews
from multilora.attention.triton_kernels import list_pages, rotate_and_write
from multilora.batch import AttentionMeta

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 256 << 20  # partial results of split requests, shared by all wrappers: they run one after another
GRAPH_INT_BYTES = 1 << 20  # a graph's plan: a few words per request


@dataclass(frozen=True, slots=True)
class _Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_pages: int  # of the arena
    scale: float
    window: int | None
    dtype: torch.dtype
    device: torch.device

    @property
    def plan_options(self) -> dict[str, Any]:
        return {
            "sm_scale": self.scale,
            "window_left": -1 if self.window is None else self.window - 1,  # FlashInfer counts the token itself out
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }


@dataclass(frozen=True, slots=True)
class _PageLists:
    """The pages of R requests: request r's are indices[indptr[r] : indptr[r + 1]]."""

    indptr: torch.Tensor  # int32 [R + 1], pinned host memory
    last_page_len: torch.Tensor  # int32 [R], pinned host memory, tokens in the last page
    requests: torch.Tensor  # int32 [5, R] on the device, see `list_pages`

    @property
    def num_pages(self) -> int:
        return int(self.indptr[-1])


def _page_lists(shape: _Shape, meta: AttentionMeta, rows: np.ndarray, padded_to: int = 0) -> _PageLists:
    """Of the requests `rows`, then of padding requests that read one token of page 0. Pages before a window are left
    out: positions count from a request's end."""
    kv, q = np.array(meta.kv_lens)[rows], np.array(meta.q_lens)[rows]
    first = np.zeros_like(kv) if shape.window is None else np.maximum(kv - q - shape.window + 1, 0) // shape.page_size
    requests = np.zeros((5, max(len(rows), padded_to)), dtype=np.int32)
    requests[0] = -1
    requests[3] = 1
    requests[:, : len(rows)] = (
        rows,
        first,
        rows,
        (kv - 1) // shape.page_size + 1 - first,
        (kv - 1) % shape.page_size,
    )
    indptr = np.zeros(requests.shape[1] + 1, dtype=np.int32)
    np.cumsum(requests[3], out=indptr[1:])
    requests[2] = indptr[:-1]
    return _PageLists(
        _pinned(indptr), _pinned(requests[4] + 1), _pinned(requests).to(shape.device, non_blocking=True)
    )


def _pinned(values: np.ndarray) -> torch.Tensor:
    """In pinned memory that PyTorch takes back only after the copies out of it have run."""
    return torch.from_numpy(values).pin_memory()


class _Decode:
    """FlashInfer's decode wrapper: requests of one new token each. Tensor cores take grouped queries as one tile."""

    def __init__(self, shape: _Shape, workspace: torch.Tensor, **graph_buffers: torch.Tensor):
        self._shape = shape
        self._wrapper = BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_tensor_cores=True,
            backend="fa2",
            use_cuda_graph=bool(graph_buffers),
            **graph_buffers,
        )
        if graph_buffers:
            small = torch.empty(GRAPH_INT_BYTES, dtype=torch.uint8, device=shape.device)
            self._wrapper.reset_workspace_buffer(workspace, small)
        self._planned = torch.cuda.Event()

    def plan(self, pages: _PageLists, indices: torch.Tensor) -> None:
        """indices: int32 [pages.num_pages] on the device."""
        s = self._shape
        self._planned.synchronize()  # the last plan has left the wrapper's one pinned buffer
        self._wrapper.plan(
            pages.indptr, indices, pages.last_page_len, s.num_heads, s.num_kv_heads, s.head_dim, s.page_size,
            **s.plan_options,
        )  # fmt: skip
        self._planned.record()

    def run(self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor) -> None:
        """q, out: [R, heads, head_dim]."""
        self._wrapper.run(q, kv, out=out)


class _Prefill:
    """FlashInfer's prefill wrapper: requests of any number of new tokens, causal. FA3 on Hopper, FA2 elsewhere."""

    def __init__(self, shape: _Shape, workspace: torch.Tensor):
        self._shape = shape
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self._planned = torch.cuda.Event()

    def plan(self, q_lens: Sequence[int], pages: _PageLists, indices: torch.Tensor) -> None:
        """indices: int32 [pages.num_pages] on the device."""
        s = self._shape
        q_indptr = _pinned(np.cumsum([0, *q_lens], dtype=np.int32))
        self._planned.synchronize()
        self._wrapper.plan(
            q_indptr, pages.indptr, indices, pages.last_page_len, s.num_heads, s.num_kv_heads, s.head_dim,
            s.page_size, causal=True, **s.plan_options,
        )  # fmt: skip
        self._planned.record()

    def run(self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor) -> None:
        """q, out: [T, heads, head_dim]."""
        self._wrapper.run(q, kv, out=out)


class FlashInferAttention:
    """The `flashinfer` backend over the arena's per-layer views, each [num_pages, page_size, kv_heads, head_dim].

    fp16 or bf16, head_dim 64, 128 or 256 (see `make_attention`).
    """

    name = "flashinfer"

    def __init__(
        self,
        kv_views: KVViews,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        sliding_window: int | None,
    ):
        pages = kv_views[0][0]
        self._kv_views = kv_views
        self._shape = _Shape(
            num_heads, num_kv_heads, head_dim, pages.shape[1], pages.shape[0], scale, sliding_window, pages.dtype,
            pages.device,
        )  # fmt: skip
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pages.device)
        self._graph_indices = torch.empty(0, dtype=torch.int32, device=pages.device)
        self._decode = _Decode(self._shape, self._workspace)
        self._prefill = _Prefill(self._shape, self._workspace)
        self._meta: AttentionMeta | None = None
        self._decodes = 0  # rows that go through the decode wrapper
        self._rows: torch.Tensor | None = None  # int64 [T], where a row of the batch stands among the queries; mixed
        self._compile()

    def prepare(self, meta: AttentionMeta) -> None:
        """See `AttentionBackend`."""
        q_lens = np.array(meta.q_lens)
        single = np.flatnonzero(q_lens == 1)
        several = np.flatnonzero(q_lens > 1)
        if len(single):
            pages = _page_lists(self._shape, meta, single)
            self._decode.plan(pages, self._indices(meta, pages))
        if len(several):
            pages = _page_lists(self._shape, meta, several)
            self._prefill.plan(q_lens[several].tolist(), pages, self._indices(meta, pages))
        self._rows = None
        if len(single) and len(several):
            order = np.argsort(np.repeat(q_lens > 1, q_lens), kind="stable")  # rows, decodes first
            self._rows = _pinned(np.argsort(order)).to(self._shape.device, non_blocking=True)
        self._meta, self._decodes = meta, len(single)

    def forward(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: CosSin) -> torch.Tensor:
        """See `AttentionBackend`."""
        meta, kv, n = self._meta, self._kv_views[layer], self._decodes
        assert meta is not None, "prepare() comes first"
        q = rotate_and_write(q, k, v, rope, *kv, meta.token_page, meta.token_slot, self._rows)
        out = torch.empty_like(q)
        if n:
            self._decode.run(q[:n], kv, out[:n])
        if n < len(q):
            self._prefill.run(q[n:], kv, out[n:])
        return out if self._rows is None else out.index_select(0, self._rows)

    def for_graph(self, batch_size: int) -> AttentionBackend | None:
        """See `AttentionBackend`. Twins share workspace and page list, so ask for the largest first."""
        most = batch_size * self._shape.num_pages
        if len(self._graph_indices) < most:
            self._graph_indices = torch.empty(most, dtype=torch.int32, device=self._shape.device)
        return _GraphAttention(self._shape, self._kv_views, self._workspace, self._graph_indices, batch_size)

    def _indices(self, meta: AttentionMeta, pages: _PageLists) -> torch.Tensor:
        indices = torch.empty(pages.num_pages, dtype=torch.int32, device=self._shape.device)
        list_pages(meta.page_table, pages.requests, indices)
        return indices

    def _compile(self) -> None:
        """Make both wrappers load their kernels, which compiles them where this machine has not done so yet."""
        if not _is_compiled(self._shape):
            logger.info("compiling attention kernels, once (one to three minutes)")
        device = self._shape.device
        page = torch.zeros(1, 1, dtype=torch.int64, device=device)
        none = torch.full((2,), -1, dtype=torch.int64, device=device)
        lists = [
            _page_lists(self._shape, AttentionMeta((n,), (n,), page, none[:n], none[:n]), np.zeros(1, dtype=np.int64))
            for n in (1, 2)
        ]
        indices = torch.zeros(2, dtype=torch.int32, device=device)

        def load(plan: Callable[..., None], *args: Any) -> None:
            with torch.cuda.device(device):  # a new thread begins on the first one
                plan(*args)

        with ThreadPoolExecutor(2) as pool:
            for done in [
                pool.submit(load, self._decode.plan, lists[0], indices[: lists[0].num_pages]),
                pool.submit(load, self._prefill.plan, [2], lists[1], indices[: lists[1].num_pages]),
            ]:
                done.result()


class _GraphAttention:
    """Decode only, over buffers that stay: the twin of `for_graph`."""

    name = "flashinfer"

    def __init__(
        self, shape: _Shape, kv_views: KVViews, workspace: torch.Tensor, indices: torch.Tensor, batch_size: int
    ):
        self._shape, self._kv_views, self._batch_size, self._indices = shape, kv_views, batch_size, indices
        self._token_page = torch.full((batch_size,), -1, dtype=torch.int64, device=shape.device)
        self._token_slot = torch.zeros(batch_size, dtype=torch.int64, device=shape.device)
        self._decode = _Decode(
            shape,
            workspace,
            paged_kv_indptr_buffer=torch.zeros(batch_size + 1, dtype=torch.int32, device=shape.device),
            paged_kv_indices_buffer=indices,
            paged_kv_last_page_len_buffer=torch.ones(batch_size, dtype=torch.int32, device=shape.device),
        )

    def prepare(self, meta: AttentionMeta) -> None:
        """See `AttentionBackend`. Reads kv_lens and page_table; where the new tokens go follows from them."""
        assert len(meta.q_lens) <= self._batch_size and max(meta.q_lens) == 1
        pages = _page_lists(self._shape, meta, np.arange(len(meta.q_lens)), self._batch_size)
        list_pages(meta.page_table, pages.requests, self._indices, (self._token_page, self._token_slot))
        self._decode.plan(pages, self._indices[: pages.num_pages])

    def forward(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: CosSin) -> torch.Tensor:
        """See `AttentionBackend`. Every tensor has `batch_size` rows."""
        kv = self._kv_views[layer]
        q = rotate_and_write(q, k, v, rope, *kv, self._token_page, self._token_slot)
        out = torch.empty_like(q)
        self._decode.run(q, kv, out)
        return out

    def for_graph(self, batch_size: int) -> AttentionBackend | None:
        """See `AttentionBackend`."""
        return None


def _is_compiled(shape: _Shape) -> bool:
    kind, dim = shape.dtype, shape.head_dim
    name = get_batch_prefill_uri(
        "fa2", kind, kind, kind, torch.int32, dim, dim, 0, shape.window is not None, False, False
    )
    return any(jit_env.FLASHINFER_JIT_DIR.glob(f"{name}*/*.so"))
