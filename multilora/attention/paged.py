"""What attention backends over pages share: our own paged decode, page lists, and the twins that CUDA graphs hold.

Requests with one new token go through `triton_decode.py`, the others through the backend's `Prefill`; RoPE and the
page write precede both. A step is planned once for each *view*, the layers that see equally far and have their keys
in one column of the page tables. When a step has requests of both kinds, the rotation writes the queries of the
decodes first, and one gather restores the order of the rows. Called by `flashinfer.py` and `triton_attention.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from multilora.attention.base import AttentionShape, GraphAttention, KVViews, PieceAttention
from multilora.attention.cascade import CascadeStep
from multilora.attention.rotate import CosSin
from multilora.attention.triton_decode import PIECE_WORDS, SPAN_WORDS, budget, cut, decode, split_budget
from multilora.attention.triton_kernels import list_pages, rotate_and_write
from multilora.batch import AttentionMeta

REQUEST_WORDS = 5  # see `list_pages`
KV = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PagedShape(AttentionShape):
    """`AttentionShape`, and what the arena adds. The KV cache has the dtype of the queries, or one of 8 bits."""

    page_size: int
    num_pages: int  # of the arena
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class View:
    """Layers that see `window` tokens (None: all) and have their pages in one column of the page tables."""

    window: int | None
    column: int


class Prefill(Protocol):
    """The requests of several new tokens, as the layers of one view attend."""

    def plan(self, q_lens: Sequence[int], requests: np.ndarray, indices: torch.Tensor) -> None:
        """Take a step. q_lens: their new tokens; requests: see `requests_of`; indices: int32, their page lists, on
        the device."""
        ...

    def run(self, q: torch.Tensor, kv: KV, out: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> None:
        """q, out: [their new tokens, heads, head_dim]; kv: the layer's pages; sinks: see `LayerAttention.forward`."""
        ...


MakePrefill = Callable[[PagedShape, View], Prefill]


def requests_of(
    shape: PagedShape, window: int | None, meta: AttentionMeta, rows: np.ndarray, padded_to: int = 0
) -> np.ndarray:
    """int32 [5, requests] as `list_pages` takes them: the requests `rows`, then padding without pages. Pages before a
    window are left out, which is sound because positions count from a request's end."""
    kv, q = np.array(meta.kv_lens)[rows], np.array(meta.q_lens)[rows]
    first = np.zeros_like(kv) if window is None else np.maximum(kv - q - window + 1, 0) // shape.page_size
    last = kv - 1
    requests = np.zeros((REQUEST_WORDS, max(len(rows), padded_to)), dtype=np.int32)
    requests[0] = -1
    requests[[0, 1, 3, 4], : len(rows)] = rows, first, last // shape.page_size + 1 - first, last % shape.page_size
    requests[2] = np.cumsum(requests[3]) - requests[3]
    return requests


def pinned(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the host, pinned where the device is a GPU: PyTorch reuses such memory only after the copies out of
    it have run."""
    copied = torch.from_numpy(values)
    return copied.pin_memory() if device.type == "cuda" else copied.clone()


class _Decode:
    """`size` requests of one new token each, in one view. Their tables are views of one int32 tensor of
    `num_words`, each at a multiple of 16 bytes: kernels are compiled anew for addresses that are none."""

    def __init__(self, shape: PagedShape, view: View, size: int):
        self.shape, self.view, self._size = shape, view, size
        self._pieces = budget(size, shape.num_kv_heads)
        sizes = REQUEST_WORDS * size, SPAN_WORDS * split_budget(size), PIECE_WORDS * self._pieces
        starts = np.cumsum([0, *(-(-words // 4) * 4 for words in sizes)]).tolist()
        self.num_words: int = starts[-1]
        self._tables = [slice(start, start + words) for start, words in zip(starts, sizes, strict=False)]

    def words(self, meta: AttentionMeta, rows: np.ndarray) -> tuple[np.ndarray, int]:
        """The tables of a step on the host (requests, spans, pieces: see `triton_decode`), and how many pages."""
        shape, window = self.shape, self.view.window
        requests = requests_of(shape, window, meta, rows, self._size)
        pages = requests[3]
        tokens = np.where(pages > 0, (pages - 1) * shape.page_size + requests[4] + 1, 0)
        skip = np.zeros_like(tokens) if window is None else np.maximum(tokens - window, 0)
        plan = cut(pages, tokens, skip, shape.page_size, self._pieces)
        words = np.zeros(self.num_words, dtype=np.int32)
        for at, table in zip(self._tables, (requests, plan.spans, plan.pieces), strict=True):
            words[at] = table.ravel()
        return words, int(pages.sum())

    def scratch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for the partial results of requests that are split: see `decode`."""
        shape = (self._pieces, self.shape.num_heads)
        partial = torch.empty(*shape, self.shape.head_dim, dtype=torch.float32, device=self.shape.device)
        return partial, torch.empty(shape, dtype=torch.float32, device=self.shape.device)

    def requests(self, words: torch.Tensor) -> torch.Tensor:
        return words[self._tables[0]].view(REQUEST_WORDS, self._size)

    def run(
        self,
        q: torch.Tensor,
        kv: KV,
        words: torch.Tensor,
        indices: torch.Tensor,
        scratch: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        layer: int,
        sinks: torch.Tensor | None,
    ) -> None:
        """q, out: [size, heads, head_dim]; kv: the layer's."""
        _, spans, pieces = (words[at] for at in self._tables)
        tables = pieces.view(-1, PIECE_WORDS), spans.view(-1, SPAN_WORDS)
        shape = self.shape
        k_scale, v_scale = shape.scales_of(layer)
        decode(
            q, kv, indices, *tables, *scratch, out, shape.scale * k_scale, v_scale, softcap=shape.softcap, sinks=sinks
        )


@dataclass(frozen=True, slots=True)
class _DecodeStep:
    """The decodes of one eager step, in one view."""

    decode: _Decode
    words: torch.Tensor
    indices: torch.Tensor
    scratch: tuple[torch.Tensor, torch.Tensor]

    def run(self, q: torch.Tensor, kv: KV, out: torch.Tensor, layer: int, sinks: torch.Tensor | None) -> None:
        """See `_Decode.run`."""
        self.decode.run(q, kv, self.words, self.indices, self.scratch, out, layer, sinks)


class PagedBackend:
    """A backend over the arena's per-layer views, each [num_pages, page_size, kv_heads, head_dim]."""

    name: str

    def __init__(
        self, kv_views: KVViews, shape: AttentionShape, dtype: torch.dtype | None, make_prefill: MakePrefill
    ):
        """dtype: of the queries; None: that of the pages."""
        pages = kv_views[0][0]
        self._kv_views = kv_views
        self.shape = PagedShape(
            **vars(shape),
            page_size=pages.shape[1],
            num_pages=pages.shape[0],
            dtype=dtype or pages.dtype,
            kv_dtype=pages.dtype,
            device=pages.device,
        )
        of_layers = [View(shape.window_of(i), shape.column_of(i)) for i in range(len(kv_views))]
        self.views = tuple(dict.fromkeys(of_layers))
        self._number = [self.views.index(view) for view in of_layers]  # of each layer's view
        self._prefills = [make_prefill(self.shape, view) for view in self.views]
        self._graph_indices = [torch.empty(0, dtype=torch.int32, device=pages.device) for _ in self.views]
        self._graph_scratch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._meta: AttentionMeta | None = None
        self._steps: list[_DecodeStep | CascadeStep] = []  # by view; empty: the step has no decodes
        self._decodes = 0  # the first rows among the queries, which `_steps` compute
        self.rows: torch.Tensor | None = None
        """int64 [T], where each row of the batch stands among the queries; None: unchanged, all are of one kind."""
        self._piece_memory: torch.Tensor | None = None
        self.cascades = any(view.window is None for view in self.views) and len({v.column for v in self.views}) == 1

    def prepare(self, meta: AttentionMeta) -> None:
        """See `AttentionBackend`."""
        q_lens = np.array(meta.q_lens)
        single = np.flatnonzero(q_lens == 1)
        several = np.flatnonzero(q_lens > 1)
        self._steps = [self._decode_step(meta, single, view) for view in self.views if len(single)]
        for view, prefill in zip(self.views, self._prefills, strict=True):
            if len(several):
                requests = requests_of(self.shape, view.window, meta, several)
                on_device = pinned(requests, self.shape.device).to(self.shape.device, non_blocking=True)
                indices = self._list_pages(meta, view, on_device, int(requests[3].sum()))
                prefill.plan(q_lens[several].tolist(), requests, indices)
        self.rows = None
        if len(single) and len(several):
            order = np.argsort(np.repeat(q_lens > 1, q_lens), kind="stable")  # rows, decodes first
            self.rows = pinned(np.argsort(order), self.shape.device).to(self.shape.device, non_blocking=True)
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
        token_page = meta.column(self.view_of(layer).column).token_page
        scales = self.shape.scales_of(layer)
        q = rotate_and_write(q, k, v, rope, *kv, token_page, meta.token_slot, self.rows, scales=scales)
        out = torch.empty_like(q)
        self.attend_to(layer, q, out, sinks)
        return out

    def view_of(self, layer: int) -> View:
        return self.views[self._number[layer]]

    def attend_to(self, layer: int, q: torch.Tensor, out: torch.Tensor, sinks: torch.Tensor | None) -> None:
        """q: rotated, its rows ordered as `rows` says; out: in the order of the batch. Both [T, heads, head_dim]."""
        kv, n, number = self._kv_views[layer], self._decodes, self._number[layer]
        found = out if self.rows is None else torch.empty_like(out)
        if self._steps:
            self._steps[number].run(q[:n], kv, found[:n], layer, sinks)
        if n < len(q):
            self._prefills[number].run(q[n:], kv, found[n:], layer, sinks)
        if self.rows is not None:
            torch.index_select(found, 0, self.rows, out=out)

    def for_graph(self, batch_size: int) -> GraphAttention | None:
        """See `AttentionBackend`. Twins share their scratch and page lists, so ask for the largest first."""
        most, device = batch_size * self.shape.num_pages, self.shape.device
        twins = [_Decode(self.shape, view, batch_size) for view in self.views]
        if self._graph_scratch is None or len(self._graph_indices[0]) < most:
            self._graph_indices = [torch.zeros(most, dtype=torch.int32, device=device) for _ in self.views]
            self._graph_scratch = twins[0].scratch()
        steps = [
            _GraphView(twin, batch_size, indices) for twin, indices in zip(twins, self._graph_indices, strict=True)
        ]
        return _GraphAttention(self._kv_views, [steps[n] for n in self._number], batch_size, self._graph_scratch)

    def for_pieces(self, rows: int) -> PieceAttention | None:
        """See `AttentionBackend`."""
        shape = self.shape
        if self._piece_memory is None:
            size = (2, rows, shape.num_heads, shape.head_dim)
            self._piece_memory = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        assert rows <= self._piece_memory.shape[1], "the largest comes first"
        q, out = self._piece_memory[:, :rows]
        return _PieceAttention(self, self._kv_views, q, out)

    def _decode_step(self, meta: AttentionMeta, rows: np.ndarray, view: View) -> _DecodeStep | CascadeStep:
        if meta.shared and view.window is None:
            return self._cascade_step(meta, rows, view)
        step = _Decode(self.shape, view, len(rows))
        words, num_pages = step.words(meta, rows)
        on_device = pinned(words, self.shape.device).to(self.shape.device, non_blocking=True)
        indices = self._list_pages(meta, view, step.requests(on_device), num_pages)
        return _DecodeStep(step, on_device, indices, step.scratch())

    def _cascade_step(self, meta: AttentionMeta, rows: np.ndarray, view: View) -> CascadeStep:
        requests = requests_of(self.shape, None, meta, rows)
        on_device = pinned(requests, self.shape.device).to(self.shape.device, non_blocking=True)
        indices = self._list_pages(meta, view, on_device, int(requests[3].sum()))
        numbers = {row: number for number, row in enumerate(rows.tolist())}
        shared = [replace(one, requests=tuple(numbers[r] for r in one.requests)) for one in meta.shared]
        return CascadeStep.make(self.shape, self.shape.page_size, requests, shared, indices)

    def _list_pages(self, meta: AttentionMeta, view: View, requests: torch.Tensor, num_pages: int) -> torch.Tensor:
        indices = torch.empty(num_pages, dtype=torch.int32, device=self.shape.device)
        list_pages(meta.column(view.column).page_table, requests, indices)
        return indices


class _GraphView:
    """The decodes of one view over buffers with fixed addresses."""

    def __init__(self, decode: _Decode, batch_size: int, indices: torch.Tensor):
        device = decode.shape.device
        self.decode, self.indices, self._batch_size = decode, indices, batch_size
        self.words = torch.zeros(decode.num_words, dtype=torch.int32, device=device)
        self.token_page = torch.full((batch_size,), -1, dtype=torch.int64, device=device)
        self.token_slot = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def prepare(self, meta: AttentionMeta) -> None:
        words, _ = self.decode.words(meta, np.arange(len(meta.q_lens)))
        self.words.copy_(pinned(words, self.words.device), non_blocking=True)
        requests = self.decode.requests(self.words)
        page_table = meta.column(self.decode.view.column).page_table
        list_pages(page_table, requests, self.indices, (self.token_page, self.token_slot))


class _GraphAttention:
    """Decode over buffers with fixed addresses: what `for_graph` returns."""

    def __init__(
        self,
        kv_views: KVViews,
        of_layers: Sequence[_GraphView],
        batch_size: int,
        scratch: tuple[torch.Tensor, torch.Tensor],
    ):
        self._kv_views, self._of_layers, self._batch_size = kv_views, of_layers, batch_size
        self._scratch = scratch
        self.columns = 1 + max(view.decode.view.column for view in of_layers)

    def prepare(self, meta: AttentionMeta) -> None:
        """See `AttentionBackend`. Reads kv_lens and page tables, from which it follows where the new tokens go."""
        assert len(meta.q_lens) <= self._batch_size and max(meta.q_lens) == 1
        for view in dict.fromkeys(self._of_layers):
            view.prepare(meta)

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
        kv, view = self._kv_views[layer], self._of_layers[layer]
        scales = view.decode.shape.scales_of(layer)
        q = rotate_and_write(q, k, v, rope, *kv, view.token_page, view.token_slot, scales=scales)
        out = torch.empty_like(q)
        view.decode.run(q, kv, view.words, view.indices, self._scratch, out, layer, sinks)
        return out


class _PieceAttention:
    """Requests of both kinds, between the graphs of a step: what `for_pieces` returns."""

    def __init__(self, attention: PagedBackend, kv_views: KVViews, q: torch.Tensor, out: torch.Tensor):
        """q, out: [rows, heads, head_dim]."""
        rows, device = len(q), q.device
        self.out = out
        self._attention, self._kv_views, self._q = attention, kv_views, q
        self._tokens = 0
        columns = dict.fromkeys(view.column for view in attention.views)
        self._token_pages = {c: torch.full((rows,), -1, dtype=torch.int64, device=device) for c in columns}
        self._token_slot = torch.zeros(rows, dtype=torch.int64, device=device)
        self._same = torch.arange(rows, device=device)
        self._to = self._same.clone()  # where a row of the batch stands among the queries
        self._sinks: dict[int, torch.Tensor | None] = {}  # by layer

    def prepare(self, meta: AttentionMeta) -> None:
        """See `PieceAttention`."""
        self._attention.prepare(meta)
        count = self._tokens = len(meta.token_slot)
        for column, token_page in self._token_pages.items():
            token_page[:count] = meta.column(column).token_page
            token_page[count:] = -1
        self._token_slot[:count] = meta.token_slot
        rows = self._attention.rows
        self._to.copy_(self._same)
        if rows is not None:
            self._to[:count] = rows

    def rotate(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rope: CosSin,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """See `PieceAttention`."""
        kv, attention = self._kv_views[layer], self._attention
        self._sinks[layer] = sinks
        token_page, scales = self._token_pages[attention.view_of(layer).column], attention.shape.scales_of(layer)
        rotate_and_write(q, k, v, rope, *kv, token_page, self._token_slot, self._to, self._q, scales)

    def attend(self, layer: int) -> None:
        """See `PieceAttention`."""
        count = self._tokens
        self._attention.attend_to(layer, self._q[:count], self.out[:count], self._sinks[layer])
