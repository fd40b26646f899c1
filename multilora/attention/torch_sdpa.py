"""Attention in plain torch, for any device and dtype: the specification of the faster backends.

Requests with one new token (decode) are gathered into few padded calls, the others (prefill) are computed one by one.
Grouped queries are not expanded: their heads become a dimension of the query. A page still holds what its last user
wrote, and a masked NaN is a NaN after the product, so a page is zeroed when a step begins it without filling it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from multilora.attention.base import AttentionShape, GraphAttention, KVViews, PieceAttention
from multilora.attention.kv_dtypes import as_stored, in_bytes
from multilora.attention.rotate import CosSin, rotate
from multilora.batch import AttentionMeta


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """B requests of one new token each, padded to the pages of the longest.

    gathered: room for the keys and the values of a layer, each [B · P, page_size, kv_heads, head_dim]. All layers
    use the same: fresh memory costs a page fault for each 4 KiB.
    """

    rows: slice | torch.Tensor  # B rows of q; int64 [B] where they are not neighbours
    pages: dict[int, torch.Tensor]  # by column, int64 [B, P]: from the first visible one; padding repeats the last
    mask: torch.Tensor  # bool [B, 1, 1, P · page_size], true: visible
    gathered: tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _PrefillPlan:
    """One request with new tokens in rows [start, end)."""

    start: int
    end: int
    pages: dict[int, torch.Tensor] | None  # by column, int64 [P]: from the first visible one; None: nothing is cached
    mask: torch.Tensor | None  # bool [q, keys]; None: plain causal over the new tokens


@dataclass(frozen=True, slots=True)
class _StepPlan:
    """What the layers with one window do in a step."""

    decodes: list[DecodePlan]
    prefills: list[_PrefillPlan]


class TorchAttention:
    """The `torch` backend over the per-layer views of the arena, each [num_pages, page_size, kv_heads, head_dim]."""

    name = "torch"
    cascades = False

    def __init__(self, kv_views: KVViews, shape: AttentionShape):
        self.kv_views = kv_views
        self.num_kv_heads = shape.num_kv_heads
        self.head_dim = shape.head_dim
        self.scale = shape.scale
        self._scales = [shape.scales_of(layer) for layer in range(len(kv_views))]
        self.softcap = shape.softcap
        self.windows = [shape.window_of(layer) for layer in range(len(kv_views))]
        self._columns = [shape.column_of(layer) for layer in range(len(kv_views))]
        self._of_window: dict[int | None, set[int]] = {}  # the columns of layers with this window
        for window, column in zip(self.windows, self._columns, strict=True):
            self._of_window.setdefault(window, set()).add(column)
        self.page_size = kv_views[0][0].shape[1]
        self._meta: AttentionMeta | None = None
        self._begun: dict[int, torch.Tensor] = {}  # by column, int64 [n]: see `_begun_pages`
        self._plans: dict[int | None, _StepPlan] = {}  # by window

    def prepare(self, meta: AttentionMeta) -> None:
        """See `AttentionBackend`. Builds the masks once; every layer uses them."""
        starts = [0, *accumulate(meta.q_lens)]
        single = [r for r, n in enumerate(meta.q_lens) if n == 1]
        self._meta = meta
        self._begun = self._begun_pages(meta)
        self._plans = {}
        for window in self._of_window:
            decodes = self._plan_decodes(meta, single, starts, window)
            prefills = [self._plan_prefill(meta, r, starts[r], window) for r, n in enumerate(meta.q_lens) if n > 1]
            self._plans[window] = _StepPlan(decodes, prefills)

    def for_graph(self, batch_size: int) -> GraphAttention | None:  # noqa: ARG002 (the contract's)
        """See `AttentionBackend`. There is none: masks and gathers follow the lengths here."""
        return None

    def for_pieces(self, rows: int) -> PieceAttention | None:  # noqa: ARG002 (the contract's)
        """See `AttentionBackend`."""
        return None

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
        assert self._meta is not None, "prepare() comes first"
        k_pages, v_pages = self.kv_views[layer]
        column = self._columns[layer]
        if self._begun:
            for pages in (k_pages, v_pages):
                in_bytes(pages).index_fill_(0, self._begun[column], 0)
        q, k, v = self._rotate_and_store(layer, q, k, v, rope)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._attend_decodes(layer, q, sinks, out)
        scales = self._scales[layer]
        for p in self._plans[self.windows[layer]].prefills:
            if p.pages is None:
                keys, values = k[p.start : p.end], v[p.start : p.end]
            else:
                keys, values = _tokens(k_pages, p.pages[column]), _tokens(v_pages, p.pages[column])
            out[p.start : p.end] = self._prefill(q[p.start : p.end], keys, values, p.mask, scales, sinks)
        return out

    # planning, once a step

    def _begun_pages(self, meta: AttentionMeta) -> dict[int, torch.Tensor]:
        """By column, pages whose first token is new in this step, and which the step does not fill."""
        found = []
        for r, (q_len, kv_len) in enumerate(zip(meta.q_lens, meta.kv_lens, strict=True)):
            slots_used = kv_len % self.page_size
            if 0 < slots_used <= q_len:
                found.append((r, kv_len // self.page_size))
        if not found:
            return {}
        requests, blocks = torch.tensor(found, device=meta.page_table.device).unbind(1)
        return {column: meta.column(column).page_table[requests, blocks] for column in set(self._columns)}

    def _first_page(self, meta: AttentionMeta, r: int, window: int | None) -> int:
        """Index, in the request's pages, of the first page that any new token of request r can see."""
        if window is None:
            return 0
        first_query = meta.kv_lens[r] - meta.q_lens[r]
        return max(0, first_query - window + 1) // self.page_size

    def _num_pages(self, meta: AttentionMeta, r: int, window: int | None) -> int:
        """How many pages request r's new tokens can see."""
        return -(-meta.kv_lens[r] // self.page_size) - self._first_page(meta, r, window)

    def _groups(self, meta: AttentionMeta, requests: list[int], window: int | None) -> Iterator[list[int]]:
        """Groups of requests of similar length, so that padding at most doubles what a group reads. Each ascends."""
        lengths = {r: self._num_pages(meta, r, window) for r in requests}
        group: list[int] = []
        for r in sorted(requests, key=lambda r: (-lengths[r], r)):
            if group and 2 * lengths[r] < lengths[group[0]]:
                yield sorted(group)
                group = []
            group.append(r)
        if group:
            yield sorted(group)

    def _plan_decodes(
        self, meta: AttentionMeta, requests: list[int], starts: list[int], window: int | None
    ) -> list[DecodePlan]:
        return [self._plan_group(meta, group, starts, window) for group in self._groups(meta, requests, window)]

    def _plan_group(self, meta: AttentionMeta, group: list[int], starts: list[int], window: int | None) -> DecodePlan:
        device = meta.page_table.device
        width = max(self._num_pages(meta, r, window) for r in group)
        table = torch.tensor(
            [(starts[r], r, self._first_page(meta, r, window), meta.kv_lens[r] - 1) for r in group], device=device
        )
        rows, requests, first, query = table.unbind(1)  # each [B]
        blocks = first[:, None] + torch.arange(width, device=device)
        blocks = blocks.minimum((query // self.page_size)[:, None])  # never another request's page
        pages = {c: meta.column(c).page_table[requests[:, None], blocks] for c in self._of_window[window]}
        key = first[:, None] * self.page_size + torch.arange(width * self.page_size, device=device)
        mask = _visible(query[:, None], key, window)
        first_row, behind = starts[group[0]], starts[group[-1]] + 1
        neighbours = behind - first_row == len(group)
        of_q = slice(first_row, behind) if neighbours else rows
        return DecodePlan(of_q, pages, mask[:, None, None, :], self._room(len(group) * width))

    def _room(self, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DecodePlan.gathered`."""
        like = in_bytes(self.kv_views[0][0])
        shape = (pages, *like.shape[1:])
        return like.new_empty(shape), like.new_empty(shape)

    def _plan_prefill(self, meta: AttentionMeta, r: int, start: int, window: int | None) -> _PrefillPlan:
        device = meta.page_table.device
        q_len, kv_len = meta.q_lens[r], meta.kv_lens[r]
        query = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
        if q_len == kv_len:
            unbounded = window is None or window >= kv_len
            mask = None if unbounded else _visible(query, query[:, 0], window)
            return _PrefillPlan(start, start + q_len, None, mask)
        first = self._first_page(meta, r, window)
        blocks = slice(first, first + self._num_pages(meta, r, window))
        pages = {c: meta.column(c).page_table[r, blocks] for c in self._of_window[window]}
        key = torch.arange(first * self.page_size, blocks.stop * self.page_size, device=device)
        return _PrefillPlan(start, start + q_len, pages, _visible(query, key, window))

    # arithmetic, once a layer

    def _rotate_and_store(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: CosSin
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns q rotated, and k and v as the pages hold them now."""
        assert self._meta is not None
        q, k = rotate(torch.cat((q, k), dim=1), *rope).split((q.shape[1], k.shape[1]), dim=1)
        k_pages, v_pages = self.kv_views[layer]
        k_scale, v_scale = self._scales[layer]
        where = (self._meta.column(self._columns[layer]).token_page, self._meta.token_slot)
        k, v = as_stored(k, k_pages.dtype, k_scale), as_stored(v, v_pages.dtype, v_scale)
        for pages, rows in ((k_pages, k), (v_pages, v)):
            in_bytes(pages).index_put_(where, in_bytes(rows))
        return q, k, v

    def _attend_decodes(self, layer: int, q: torch.Tensor, sinks: torch.Tensor | None, out: torch.Tensor) -> None:
        """Write the rows of requests with one new token. q: rotated; out: as q."""
        k_pages, v_pages = self.kv_views[layer]
        for plan in self._plans[self.windows[layer]].decodes:
            pages, (k_room, v_room) = plan.pages[self._columns[layer]], plan.gathered
            found = _tokens(k_pages, pages, k_room), _tokens(v_pages, pages, v_room)
            out[plan.rows] = self._decode(q[plan.rows], *found, plan.mask, self._scales[layer], sinks)

    def _decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor,
        scales: tuple[float, float],
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """q: [B, heads, head_dim]; k, v: [B · keys, kv_heads, head_dim]; mask: see `DecodePlan`. The query heads of
        one KV head stand where query tokens usually do."""
        grouped = q.reshape(q.shape[0], self.num_kv_heads, -1, self.head_dim)  # [B, kv_heads, group, head_dim]
        keys = k.to(q.dtype).unflatten(0, (q.shape[0], -1)).transpose(1, 2)
        values = v.to(q.dtype).unflatten(0, (q.shape[0], -1)).transpose(1, 2)
        # both [B, kv_heads, keys, head_dim]
        if sinks is not None:
            sinks = sinks.view(1, self.num_kv_heads, -1, 1)
        return self._attend(grouped, keys, values, mask, scales, sinks).reshape(q.shape)

    def _prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scales: tuple[float, float],
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """q: [q, heads, head_dim]; k, v: [keys, kv_heads, head_dim]. The group is the batch: as heads of stride 0 it
        makes PyTorch's CUDA kernel wrong in the last query of 64 n + 1 (pytorch issue 191937)."""
        grouped = q.unflatten(1, (self.num_kv_heads, -1)).permute(2, 1, 0, 3)  # [group, kv_heads, q, head_dim]
        keys = k.to(q.dtype).transpose(0, 1).expand(grouped.shape[0], -1, -1, -1)  # [group, kv_heads, keys, head_dim]
        values = v.to(q.dtype).transpose(0, 1).expand(grouped.shape[0], -1, -1, -1)
        if sinks is not None:
            sinks = sinks.view(self.num_kv_heads, -1).T[:, :, None, None]
        return self._attend(grouped, keys, values, mask, scales, sinks).permute(2, 1, 0, 3).flatten(1, 2)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scales: tuple[float, float],
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """q: [..., q, head_dim]; k, v: [..., keys, head_dim]; mask: bool, broadcasts to [..., q, keys], None: causal;
        sinks: broadcasts to [..., q, 1]; scales: of stored keys and values."""
        scale, v_scale = self.scale * scales[0], scales[1]
        if self.softcap is None and sinks is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
            return y if v_scale == 1.0 else y * v_scale
        scores = (q @ k.transpose(-1, -2) * scale).float()  # [..., q, keys]
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores.masked_fill_(~mask, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.float().expand(*scores.shape[:-1], 1)), dim=-1)
        weights = scores.softmax(dim=-1)[..., : k.shape[-2]]
        y = weights.to(q.dtype) @ v
        return y if v_scale == 1.0 else y * v_scale


def _visible(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    """Bool mask, true where `query` sees `key`: absolute positions that broadcast against each other."""
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _tokens(pages: torch.Tensor, which: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The tokens of these pages in order, [which.numel() · page_size, kv_heads, head_dim], copied (to `out`)."""
    found = torch.index_select(in_bytes(pages), 0, which.flatten(), out=out).flatten(0, 1)
    return found.view(pages.dtype)
