"""Attention on a CPU in C++: rotation, pages and requests with one new token in two calls a layer.

Prompts stay with torch's attention (`torch_sdpa.py`), which this backend is in everything else: it is the
specification, too.
"""

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch

from multilora.attention.base import AttentionShape, KVViews
from multilora.attention.rotate import CosSin
from multilora.attention.torch_sdpa import DecodePlan, TorchAttention
from multilora.batch import AttentionMeta
from multilora.kernels.cpp.library import DTYPES, library


class _Heads(ctypes.Structure):
    """`Heads` of `attention.cpp`."""

    _fields_ = (
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim", "page_size", "dtype")),
        *((name, c_double) for name in ("scale", "softcap")),
    )


class _Pages(ctypes.Structure):
    """`Pages` of `attention.cpp`."""

    _fields_ = (("data", c_void_p), ("page_stride", c_int64), ("token_stride", c_int64))


class CppAttention(TorchAttention):
    """The `cpp` backend, for keys and values in the model's dtype, one of `library.DTYPES`."""

    name = "cpp"

    def __init__(self, kv_views: KVViews, shape: AttentionShape):
        super().__init__(kv_views, shape)
        self._library = library()
        dtype = DTYPES[kv_views[0][0].dtype]
        heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim, self.page_size, dtype)
        self._heads = _Heads(*heads, shape.scale, shape.softcap or 0.0)
        self._pages: list[tuple[_Pages, _Pages]] = []
        self._decodes: dict[int | None, torch.Tensor] = {}  # by window, int64 [4, B]: row, request, first, kv_len
        self._where: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by column: page table, and pages of tokens
        self._slots = torch.zeros(0, dtype=torch.int64)  # inside those pages

    def prepare(self, meta: AttentionMeta) -> None:
        """See `AttentionBackend`."""
        self._library.set_num_threads(torch.get_num_threads())
        super().prepare(meta)
        self._pages = [(_pages_of(k), _pages_of(v)) for k, v in self.kv_views]  # they are elsewhere after every sleep
        self._where = {
            column: (meta.column(column).page_table.contiguous(), meta.column(column).token_page.contiguous())
            for column in set(self._columns)
        }
        self._slots = meta.token_slot.contiguous()

    def forward(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rope: CosSin,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend`. Queries in another dtype than the cache's, which layers of transformers may have,
        are rounded to that first."""
        dtype = self.kv_views[layer][0].dtype
        return super().forward(layer, q.to(dtype), k.to(dtype), v.to(dtype), rope, sinks).to(q.dtype)

    def _plan_decodes(
        self, meta: AttentionMeta, requests: list[int], starts: list[int], window: int | None
    ) -> list[DecodePlan]:
        table = [
            [starts[r] for r in requests],
            requests,
            [max(0, meta.kv_lens[r] - window) if window is not None else 0 for r in requests],
            [meta.kv_lens[r] for r in requests],
        ]
        self._decodes[window] = torch.tensor(table, dtype=torch.int64)
        return []

    def _rotate_and_store(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: CosSin
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = _dense(q), _dense(k), _dense(v)
        cos, sin = (angles.float().contiguous() for angles in rope)
        assert cos.shape == sin.shape == (len(q), 1, q.shape[2] // 2) and len(q) == len(self._slots)
        q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
        k_pages, v_pages = self._pages[layer]
        self._library.rotate_and_store(
            *(ctypes.addressof(self._heads), len(q), q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0)),
            *(v.data_ptr(), v.stride(0), cos.data_ptr(), sin.data_ptr(), q_out.data_ptr(), k_out.data_ptr()),
            *(ctypes.addressof(k_pages), ctypes.addressof(v_pages)),
            *(self._where[self._columns[layer]][1].data_ptr(), self._slots.data_ptr()),
        )
        return q_out, k_out, v

    def _attend_decodes(self, layer: int, q: torch.Tensor, sinks: torch.Tensor | None, out: torch.Tensor) -> None:
        plan = self._decodes[self.windows[layer]]
        if plan.shape[1] == 0:
            return
        table = self._where[self._columns[layer]][0]
        sinks = None if sinks is None else sinks.float().contiguous()
        k_pages, v_pages = self._pages[layer]
        self._library.decode(
            *(ctypes.addressof(self._heads), plan.shape[1], q.data_ptr(), *(row.data_ptr() for row in plan)),
            *(table.data_ptr(), table.shape[1], ctypes.addressof(k_pages), ctypes.addressof(v_pages)),
            *(None if sinks is None else sinks.data_ptr(), out.data_ptr()),
        )


def _pages_of(view: torch.Tensor) -> _Pages:
    assert _dense(view) is view
    return _Pages(view.data_ptr(), view.stride(0), view.stride(1))


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x, [..., heads, head_dim], with the heads of a token one after the other."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()
