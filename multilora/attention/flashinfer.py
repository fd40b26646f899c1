"""Attention for CUDA: FlashInfer's paged prefill, our own paged decode; RoPE and the page write precede both.

It owns FlashInfer's wrapper and workspace, and the page lists of a step. Requests with one new token go through
`triton_decode.py`, the others through the prefill wrapper; one plan per step serves all layers. When a step has both
kinds, the rotation writes the queries of the decodes first, and one gather restores the order of the rows.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from flashinfer.jit import env as jit_env
from flashinfer.jit import get_batch_prefill_uri

from multilora.attention.base import AttentionShape, KVViews, PieceAttention, StepAttention
from multilora.attention.rotate import CosSin
from multilora.attention.triton_decode import PIECE_WORDS, SPAN_WORDS, budget, cut, decode, split_budget
from multilora.attention.triton_kernels import list_pages, rotate_and_write
from multilora.batch import AttentionMeta

logger = logging.getLogger(__name__)

WORKSPACE_BYTES = 256 << 20  # for FlashInfer
REQUEST_WORDS = 5  # see `list_pages`


@dataclass(frozen=True, kw_only=True)
class _Shape(AttentionShape):
    """`AttentionShape`, and what the arena adds. The KV cache has the dtype of the queries, or one of 8 bits."""

    page_size: int
    num_pages: int  # of the arena
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device

    @property
    def plan_options(self) -> dict[str, Any]:
        """Arguments of FlashInfer's `plan` that every step shares."""
        return {
            "sm_scale": self.scale,
            "window_left": (self.sliding_window or 0) - 1,  # FlashInfer counts the token itself out; -1: no window
            "q_data_type": self.dtype,
            "kv_data_type": self.kv_dtype,
        }


def _requests(shape: _Shape, meta: AttentionMeta, rows: np.ndarray, padded_to: int = 0) -> np.ndarray:
    """int32 [5, requests] as `list_pages` takes them: the requests `rows`, then padding without pages. Pages before a
    window are left out, which is sound because positions count from a request's end."""
    kv, q = np.array(meta.kv_lens)[rows], np.array(meta.q_lens)[rows]
    window = shape.sliding_window
    first = np.zeros_like(kv) if window is None else np.maximum(kv - q - window + 1, 0) // shape.page_size
    last = kv - 1
    requests = np.zeros((REQUEST_WORDS, max(len(rows), padded_to)), dtype=np.int32)
    requests[0] = -1
    requests[[0, 1, 3, 4], : len(rows)] = rows, first, last // shape.page_size + 1 - first, last % shape.page_size
    requests[2] = np.cumsum(requests[3]) - requests[3]
    return requests


def _pinned(values: np.ndarray) -> torch.Tensor:
    """A copy in pinned memory, which PyTorch reuses only after the copies out of it have run."""
    return torch.from_numpy(values).pin_memory()


class _Decode:
    """`size` requests of one new token each. Their tables are views of one int32 tensor of `num_words`."""

    def __init__(self, shape: _Shape, size: int):
        self.shape, self._size = shape, size
        self._pieces = budget(size, shape.num_kv_heads)
        self._sizes = REQUEST_WORDS * size, SPAN_WORDS * split_budget(size), PIECE_WORDS * self._pieces
        self.num_words = sum(self._sizes)

    def words(self, meta: AttentionMeta, rows: np.ndarray) -> tuple[np.ndarray, int]:
        """The tables of a step on the host (requests, spans, pieces: see `triton_decode`), and how many pages."""
        shape = self.shape
        requests = _requests(shape, meta, rows, self._size)
        pages = requests[3]
        tokens = np.where(pages > 0, (pages - 1) * shape.page_size + requests[4] + 1, 0)
        window = shape.sliding_window
        skip = np.zeros_like(tokens) if window is None else np.maximum(tokens - window, 0)
        plan = cut(pages, tokens, skip, shape.page_size, self._pieces)
        return np.concatenate((requests.ravel(), plan.spans.ravel(), plan.pieces.ravel())), int(pages.sum())

    def scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for the partial results of requests that are split: see `decode`."""
        shape = (self._pieces, self.shape.num_heads)
        partial = torch.empty(*shape, self.shape.head_dim, dtype=torch.float32, device=self.shape.device)
        return partial, torch.empty(shape, dtype=torch.float32, device=self.shape.device)

    def requests(self, words: torch.Tensor) -> torch.Tensor:
        return words[: self._sizes[0]].view(REQUEST_WORDS, self._size)

    def run(
        self,
        q: torch.Tensor,
        kv: tuple[torch.Tensor, torch.Tensor],
        words: torch.Tensor,
        indices: torch.Tensor,
        scratch: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        layer: int,
    ) -> None:
        """q, out: [size, heads, head_dim]; kv: the layer's."""
        _, spans, pieces = words.split(self._sizes)
        tables = pieces.view(-1, PIECE_WORDS), spans.view(-1, SPAN_WORDS)
        k_scale, v_scale = self.shape.scales_of(layer)
        decode(q, kv, indices, *tables, *scratch, out, self.shape.scale * k_scale, v_scale)


@dataclass(frozen=True, slots=True)
class _DecodeStep:
    """The decodes of one eager step."""

    decode: _Decode
    words: torch.Tensor
    indices: torch.Tensor
    scratch: tuple[torch.Tensor, torch.Tensor]


class _PrefillWrapper:
    """FlashInfer's prefill wrapper: requests of any number of new tokens, causal. FA3 on Hopper, FA2 elsewhere."""

    def __init__(self, shape: _Shape, workspace: torch.Tensor):
        self._shape = shape
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self._planned = torch.cuda.Event()

    def plan(self, q_lens: Sequence[int], requests: np.ndarray, indices: torch.Tensor) -> None:
        """requests: see `_requests`; indices: int32 [all pages] on the device."""
        s = self._shape
        q_indptr = _pinned(np.cumsum([0, *q_lens], dtype=np.int32))
        indptr = _pinned(np.cumsum([0, *requests[3]], dtype=np.int32))
        self._planned.synchronize()  # the last plan has left the wrapper's one pinned buffer
        self._wrapper.plan(
            q_indptr, indptr, indices, _pinned(requests[4] + 1), s.num_heads, s.num_kv_heads, s.head_dim,
            s.page_size, causal=True, **s.plan_options,
        )  # fmt: skip
        self._planned.record()

    def run(self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor, layer: int) -> None:
        """q, out: [T, heads, head_dim]; kv: the layer's."""
        if self._shape.kv_dtype == self._shape.dtype:
            self._wrapper.run(q, kv, out=out)
        else:
            k_scale, v_scale = self._shape.scales_of(layer)
            self._wrapper.run(q, kv, out=out, k_scale=k_scale, v_scale=v_scale)


class FlashInferAttention:
    """The `flashinfer` backend over the arena's per-layer views, each [num_pages, page_size, kv_heads, head_dim].

    fp16 or bf16, head_dim 64, 128 or 256 (see `flashinfer_obstacle`).
    """

    name = "flashinfer"

    def __init__(self, kv_views: KVViews, shape: AttentionShape, dtype: torch.dtype | None = None):
        """dtype: of the queries; None: that of the pages."""
        pages = kv_views[0][0]
        self._kv_views = kv_views
        self.shape = _Shape(
            **vars(shape),
            page_size=pages.shape[1],
            num_pages=pages.shape[0],
            dtype=dtype or pages.dtype,
            kv_dtype=pages.dtype,
            device=pages.device,
        )
        self._graph_indices = torch.empty(0, dtype=torch.int32, device=pages.device)
        self._graph_scratch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._prefill = _PrefillWrapper(
            self.shape, torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pages.device)
        )
        self._meta: AttentionMeta | None = None
        self._step: _DecodeStep | None = None
        self._decodes = 0  # the first rows among the queries, which `_step` computes
        self.rows: torch.Tensor | None = None
        """int64 [T], where each row of the batch stands among the queries; None: unchanged, all are of one kind."""
        self._piece_memory: torch.Tensor | None = None
        self._compile()

    def prepare(self, meta: AttentionMeta) -> None:
        """See `AttentionBackend`."""
        q_lens = np.array(meta.q_lens)
        single = np.flatnonzero(q_lens == 1)
        several = np.flatnonzero(q_lens > 1)
        self._step = self._decode_step(meta, single) if len(single) else None
        if len(several):
            requests = _requests(self.shape, meta, several)
            on_device = _pinned(requests).to(self.shape.device, non_blocking=True)
            indices = self._list_pages(meta, on_device, int(requests[3].sum()))
            self._prefill.plan(q_lens[several].tolist(), requests, indices)
        self.rows = None
        if len(single) and len(several):
            order = np.argsort(np.repeat(q_lens > 1, q_lens), kind="stable")  # rows, decodes first
            self.rows = _pinned(np.argsort(order)).to(self.shape.device, non_blocking=True)
        self._meta, self._decodes = meta, len(single)

    def forward(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rope: CosSin,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend`."""
        meta, kv = self._meta, self._kv_views[layer]
        assert meta is not None, "prepare() comes first"
        assert sinks is None, "flashinfer_obstacle() refuses models with sinks"
        q = rotate_and_write(
            q, k, v, rope, *kv, meta.token_page, meta.token_slot, self.rows, scales=self.shape.scales_of(layer)
        )
        out = torch.empty_like(q)
        self.attend_to(layer, q, out)
        return out

    def attend_to(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        """q: rotated, its rows ordered as `rows` says; out: in the order of the batch. Both [T, heads, head_dim]."""
        kv, n = self._kv_views[layer], self._decodes
        found = out if self.rows is None else torch.empty_like(out)
        if self._step is not None:
            step = self._step
            step.decode.run(q[:n], kv, step.words, step.indices, step.scratch, found[:n], layer)
        if n < len(q):
            self._prefill.run(q[n:], kv, found[n:], layer)
        if self.rows is not None:
            torch.index_select(found, 0, self.rows, out=out)

    def for_graph(self, batch_size: int) -> StepAttention | None:
        """See `AttentionBackend`. Twins share their scratch and page list, so ask for the largest first."""
        most = batch_size * self.shape.num_pages
        twin = _Decode(self.shape, batch_size)
        if self._graph_scratch is None or len(self._graph_indices) < most:
            self._graph_indices = torch.zeros(most, dtype=torch.int32, device=self.shape.device)
            self._graph_scratch = twin.scratch()
        return _GraphAttention(self.shape, self._kv_views, twin, batch_size, self._graph_indices, self._graph_scratch)

    def for_pieces(self, rows: int) -> PieceAttention | None:
        """See `AttentionBackend`."""
        shape = self.shape
        if self._piece_memory is None:
            size = (2, rows, shape.num_heads, shape.head_dim)
            self._piece_memory = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        assert rows <= self._piece_memory.shape[1], "the largest comes first"
        q, out = self._piece_memory[:, :rows]
        return _PieceAttention(self, self._kv_views, q, out)

    def _decode_step(self, meta: AttentionMeta, rows: np.ndarray) -> _DecodeStep:
        step = _Decode(self.shape, len(rows))
        words, num_pages = step.words(meta, rows)
        on_device = _pinned(words).to(self.shape.device, non_blocking=True)
        indices = self._list_pages(meta, step.requests(on_device), num_pages)
        return _DecodeStep(step, on_device, indices, step.scratch())

    def _list_pages(self, meta: AttentionMeta, requests: torch.Tensor, num_pages: int) -> torch.Tensor:
        indices = torch.empty(num_pages, dtype=torch.int32, device=self.shape.device)
        list_pages(meta.page_table, requests, indices)
        return indices

    def _compile(self) -> None:
        """Make FlashInfer load its kernels, which compiles them unless this machine has done so before."""
        if not _is_compiled(self.shape):
            logger.info("compiling attention kernels, once (one to three minutes)")
        requests = np.array([[0], [0], [0], [-(-2 // self.shape.page_size)], [1 % self.shape.page_size]], np.int32)
        indices = torch.zeros(int(requests[3, 0]), dtype=torch.int32, device=self.shape.device)
        self._prefill.plan([2], requests, indices)


class _GraphAttention:
    """Decode over buffers with fixed addresses: what `for_graph` returns."""

    def __init__(
        self,
        shape: _Shape,
        kv_views: KVViews,
        decode: _Decode,
        batch_size: int,
        indices: torch.Tensor,
        scratch: tuple[torch.Tensor, torch.Tensor],
    ):
        self._kv_views, self._decode, self._batch_size = kv_views, decode, batch_size
        self._indices, self._scratch = indices, scratch
        self._words = torch.zeros(decode.num_words, dtype=torch.int32, device=shape.device)
        self._token_page = torch.full((batch_size,), -1, dtype=torch.int64, device=shape.device)
        self._token_slot = torch.zeros(batch_size, dtype=torch.int64, device=shape.device)

    def prepare(self, meta: AttentionMeta) -> None:
        """See `AttentionBackend`. Reads kv_lens and page_table, from which it follows where the new tokens go."""
        assert len(meta.q_lens) <= self._batch_size and max(meta.q_lens) == 1
        words, _ = self._decode.words(meta, np.arange(len(meta.q_lens)))
        self._words.copy_(_pinned(words), non_blocking=True)
        requests = self._decode.requests(self._words)
        list_pages(meta.page_table, requests, self._indices, (self._token_page, self._token_slot))

    def forward(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rope: CosSin,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend`. Every tensor has `batch_size` rows."""
        assert sinks is None, "flashinfer_obstacle() refuses models with sinks"
        kv = self._kv_views[layer]
        scales = self._decode.shape.scales_of(layer)
        q = rotate_and_write(q, k, v, rope, *kv, self._token_page, self._token_slot, scales=scales)
        out = torch.empty_like(q)
        self._decode.run(q, kv, self._words, self._indices, self._scratch, out, layer)
        return out


class _PieceAttention:
    """Requests of both kinds, between the graphs of a step: what `for_pieces` returns."""

    def __init__(self, attention: FlashInferAttention, kv_views: KVViews, q: torch.Tensor, out: torch.Tensor):
        """q, out: [rows, heads, head_dim]."""
        rows, device = len(q), q.device
        self.out = out
        self._attention, self._kv_views, self._q = attention, kv_views, q
        self._tokens = 0
        self._token_page = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self._token_slot = torch.zeros(rows, dtype=torch.int64, device=device)
        self._same = torch.arange(rows, device=device)
        self._to = self._same.clone()  # where a row of the batch stands among the queries

    def prepare(self, meta: AttentionMeta) -> None:
        """See `PieceAttention`."""
        self._attention.prepare(meta)
        count = self._tokens = len(meta.token_page)
        self._token_page[:count] = meta.token_page
        self._token_page[count:] = -1
        self._token_slot[:count] = meta.token_slot
        rows = self._attention.rows
        self._to.copy_(self._same)
        if rows is not None:
            self._to[:count] = rows

    def rotate(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: CosSin) -> None:
        """See `PieceAttention`."""
        kv = self._kv_views[layer]
        scales = self._attention.shape.scales_of(layer)
        rotate_and_write(q, k, v, rope, *kv, self._token_page, self._token_slot, self._to, self._q, scales)

    def attend(self, layer: int) -> None:
        """See `PieceAttention`."""
        self._attention.attend_to(layer, self._q[: self._tokens], self.out[: self._tokens])


def _is_compiled(shape: _Shape) -> bool:
    kind, kv_kind, dim = shape.dtype, shape.kv_dtype, shape.head_dim
    names = [
        get_batch_prefill_uri(
            backend, kind, kv_kind, kind, torch.int32, dim, dim, 0, shape.sliding_window is not None, False, False
        )
        for backend in ("fa2", "fa3")
    ]
    return any(any(jit_env.FLASHINFER_JIT_DIR.glob(f"{name}*/*.so")) for name in names)
