"""The Triton backend against the torch backend in fp32: in Triton's interpreter, and on a GPU if there is one.

Covers `paged.py`, `triton_prefill.py`, `triton_scores.py` too.
"""

import json
import random
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from compilers import compile_elsewhere

from multilora.attention import paged, triton_decode, triton_prefill
from multilora.attention.base import AttentionShape, KVViews
from multilora.attention.torch_sdpa import TorchAttention
from multilora.attention.triton_attention import TritonAttention
from multilora.attention.triton_prefill import blocks_of
from multilora.attention.triton_scores import block_tokens
from multilora.batch import AttentionMeta, ColumnPages
from multilora.memory.kv_layout import KVLayout

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16]
if DEVICE.type == "cuda":  # the interpreter rounds bfloat16 towards zero
    DTYPES.append(torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
ROOT = Path(__file__).parents[2]
PAGE = 4
ROWS = triton_prefill.WIDE_ROWS  # of a program in fp32
BATCHES = {  # new tokens, tokens in all
    "decodes": [(1, 5), (1, 33), (1, 1), (1, 16), (1, 70)],
    "fresh prompts": [(13, 13), (2, 2), (ROWS + 3, ROWS + 3)],
    "chunks": [(5, 20), (7, 8), (2, 75), (ROWS, 2 * ROWS)],
    "both": [(1, 40), (9, 9), (1, 3), (ROWS + 1, 9 + 2 * ROWS), (1, 77), (3, 16)],
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a window": {"sliding_window": 6},
    "a window of one": {"sliding_window": 1},
    "windows by layer": {"layer_windows": (None, 7)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"layer_windows": (9, None), "softcap": 2.0, "sinks": True},
}
EACH_KIND = [name if name == "all" else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]


@dataclass
class Case:
    """A step over two layers, each of which has its pages in a column of its own where windows differ."""

    meta: AttentionMeta
    shape: AttentionShape
    arena: torch.Tensor
    layout: KVLayout
    qkv: torch.Tensor  # [2, T, heads + 2 · KV heads, head_dim]
    rope: tuple[torch.Tensor, torch.Tensor]
    sinks: torch.Tensor | None

    def run(self, attention: Any) -> list[torch.Tensor]:
        attention.prepare(self.meta)
        return self.forward(attention)

    def forward(self, attention: Any) -> list[torch.Tensor]:
        split = [self.shape.num_heads, self.shape.num_kv_heads, self.shape.num_kv_heads]
        return [attention.forward(i, *self.qkv[i].split(split, dim=1), self.rope, self.sinks) for i in (0, 1)]

    def views(self, arena: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> KVViews:
        return replace(self.layout, dtype=dtype or self.layout.dtype).views(self.arena if arena is None else arena)

    def expected(self) -> list[torch.Tensor]:
        """From the torch backend in fp32, over a copy of the pages."""
        wide = self.arena.view(self.layout.dtype).float().view(torch.uint8).clone()
        twin = replace(self, qkv=self.qkv.float(), sinks=None if self.sinks is None else self.sinks.float())
        return twin.run(TorchAttention(self.views(wide, torch.float32), self.shape))


def make_case(
    lens: list[tuple[int, int]], heads: tuple[int, int, int], dtype: torch.dtype, seed: int = 0, **kind: Any
) -> Case:
    """heads: query heads, KV heads, head_dim. Pages are dealt at random and full of random numbers."""
    num_heads, kv_heads, dim = heads
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    windows = kind.get("layer_windows", ())
    columns = (0, 1) if windows else ()
    shape = AttentionShape(
        num_heads, kv_heads, dim, 0.3, kind.pop("sliding_window", None), layer_columns=columns, **kind
    )
    layout = KVLayout(2, PAGE, kv_heads, dim, dtype)
    counts = [-(-total // PAGE) for _, total in lens]
    deck = list(range(2 * sum(counts) + 5))
    rng.shuffle(deck)
    arena = torch.randn(len(deck), layout.page_bytes // dtype.itemsize, generator=g).to(dtype).view(torch.uint8)
    tables = []
    for window in windows or (None,):
        table = torch.zeros(len(lens), max(counts) + 2, dtype=torch.int64)
        token_page = []
        for r, (new, total) in enumerate(lens):
            pages = [deck.pop() for _ in range(counts[r])]
            behind = 0 if window is None else max(0, total - new - window + 1) // PAGE
            table[r, : len(pages)] = torch.tensor([-1] * behind + pages[behind:])
            token_page += [pages[t // PAGE] for t in range(total - new, total)]
        tables.append(ColumnPages(table.to(DEVICE), torch.tensor(token_page, device=DEVICE)))
    slots = [t % PAGE for new, total in lens for t in range(total - new, total)]
    first, *further = tables
    q_lens, kv_lens = zip(*lens, strict=True)
    tokens = len(slots)
    meta = AttentionMeta(
        q_lens, kv_lens, first.page_table, first.token_page, torch.tensor(slots, device=DEVICE), tuple(further)
    )
    angle = torch.randn(tokens, 1, dim // 2, generator=g).to(DEVICE)
    qkv = torch.randn(2, tokens, num_heads + 2 * kv_heads, dim, generator=g).to(DEVICE, dtype)
    sinks = torch.randn(num_heads, generator=g).to(DEVICE, dtype) if shape.sinks else None
    return Case(meta, shape, arena.to(DEVICE), layout, qkv, (angle.cos(), angle.sin()), sinks)


def check(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        assert torch.isfinite(g).all()
        for row, wanted in zip(g.float().flatten(1), w.flatten(1), strict=True):  # no row hides behind the others
            assert (row - wanted).norm() / wanted.norm() < TOLERANCE[g.dtype]


@pytest.fixture
def eager_to_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut long decodes into pieces as if it cost nothing."""
    monkeypatch.setattr(triton_decode, "MIN_PIECE", PAGE)
    monkeypatch.setattr(triton_decode, "MERGE_TOKENS", 1)


@pytest.mark.parametrize("kind", EACH_KIND)
@pytest.mark.parametrize("batch", BATCHES)
def test_against_torch(batch: str, kind: str, eager_to_split: None) -> None:
    case = make_case(BATCHES[batch], (4, 2, 16), torch.float32, **KINDS[kind])
    want = case.expected()
    check(case.run(TritonAttention(case.views(), case.shape)), want)


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        pytest.param(heads, dtype, marks=() if (heads, dtype) == ((6, 2, 80), torch.float16) else pytest.mark.slow)
        for heads in ((6, 2, 80), (4, 4, 8), (3, 1, 96), (2, 1, 256), (8, 1, 24))
        for dtype in DTYPES
    ],
    ids=str,
)
def test_heads_of_any_size(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = make_case([(1, 21), (9, 30), (3, 3)], heads, dtype, **KINDS["all"])
    want = case.expected()
    check(case.run(TritonAttention(case.views(), case.shape)), want)


def test_new_keys_and_values_are_in_the_pages_of_their_column_and_nothing_else_is_written() -> None:
    case = make_case(BATCHES["both"], (4, 2, 16), torch.float32, **KINDS["windows by layer"])
    before = case.arena.clone()
    twin = replace(case, arena=before.clone())
    case.run(TritonAttention(case.views(), case.shape))
    twin.run(TorchAttention(twin.views(), twin.shape))
    for layer, (got, want, old) in enumerate(zip(case.views(), twin.views(), case.views(before), strict=True)):
        where = case.meta.column(layer).token_page, case.meta.token_slot
        for pages, wanted, past in zip(got, want, old, strict=True):
            torch.testing.assert_close(pages[where], wanted[where])
            pages[where] = past[where]
    assert torch.equal(case.arena, before)


@pytest.mark.parametrize("kind", EACH_KIND)
def test_what_graphs_hold_is_the_same(kind: str, eager_to_split: None) -> None:
    case = make_case(BATCHES["decodes"], (4, 2, 16), torch.float32, **KINDS[kind])
    want = case.expected()
    attention = TritonAttention(case.views(), case.shape)
    twin = attention.for_graph(8)
    assert twin is not None and twin.columns == 1 + max(case.shape.layer_columns, default=0)
    count = len(case.meta.q_lens)
    padding = torch.zeros(2, 8 - count, *case.qkv.shape[2:], device=DEVICE)
    padded = replace(case, qkv=torch.cat((case.qkv, padding), dim=1))
    padded.rope = tuple(torch.cat((part, part[: 8 - count])) for part in case.rope)  # type: ignore[assignment]
    before = padded.arena.clone()
    for _ in range(2):  # the second over what the first has left in the buffers
        padded.arena.copy_(before)
        check([layer[:count] for layer in padded.run(twin)], want)


@pytest.mark.parametrize("kind", EACH_KIND)
def test_pieces_are_the_same(kind: str) -> None:
    case = make_case(BATCHES["both"], (4, 2, 16), torch.float32, **KINDS[kind])
    want, tokens = case.expected(), case.qkv.shape[1]
    attention = TritonAttention(case.views(), case.shape)
    pieces = attention.for_pieces(tokens + 5)
    assert pieces is not None
    pieces.prepare(case.meta)
    q, k, v = torch.nn.functional.pad(case.qkv, (0, 0, 0, 0, 0, 5)).split([4, 2, 2], dim=2)
    rope = tuple(torch.cat((part, part[:5])) for part in case.rope)
    got = []
    for layer in (0, 1):
        pieces.rotate(layer, q[layer], k[layer], v[layer], rope, case.sinks)  # type: ignore[arg-type]
        pieces.attend(layer)
        got.append(pieces.out[:tokens].clone())
    check(got, want)


def test_blocks() -> None:
    q_lens, tokens = [ROWS + 5, 3], [100, 203]
    pages = [-(-n // PAGE) for n in tokens]
    starts = [0, *accumulate(pages)][:2]
    requests = np.array([[0, 1], [0, 0], starts, pages, [(n - 1) % PAGE for n in tokens]], np.int32)
    assert blocks_of(q_lens, requests, PAGE, ROWS).tolist() == [
        [ROWS + 5, 3, 200, 25],
        [ROWS, 5, 100 - 5, 0],
        [0, ROWS, 100 - 5 - ROWS, 0],
    ]


@pytest.mark.parametrize(("memory", "tokens"), [(227 << 10, [64, 64, 64, 64, 32]), (99 << 10, [64, 64, 32, 32, 16])])
def test_an_iteration_fits_in_shared_memory(memory: int, tokens: list[int]) -> None:
    half, full = torch.bfloat16, torch.float32
    sizes = [(half, 64), (half, 128), (half, 256), (full, 128), (full, 256)]
    assert [block_tokens(dtype, width, memory) for dtype, width in sizes] == tokens


CASES = [
    f"{kernel} {dtype} {pages} {dim} {capability}"
    for capability in (80, 89, 90, 120)
    for kernel in ("prefill", "decode")
    for dtype, pages, dim in (("bf16", "bf16", 96), ("bf16", "bf16", 256), ("fp32", "fp32", 256))
]
CASES += ["prefill fp16 fp16 128 90", "prefill bf16 fp8e4nv 64 90", "decode bf16 fp8e4nv 128 90"]
CASES += [f"{kernel} bf16 bf16 {dim} {capability}" for kernel in ("rotate", "merge") for dim in (96, 128)
          for capability in (80, 90)] + ["rotate bf16 fp8e4nv 128 90"]  # fmt: skip


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_and_fit_in_them() -> None:
    lines = compile_elsewhere("compile_attention.py", lines="\n".join(CASES))
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [" ".join(one["case"]) for one in found] == CASES
    assert [one for one in found if not 0 <= one["shared"] <= one["most"]] == []


@pytest.mark.parametrize("size", [1, 2, 3, 16, 33])
def test_tables_of_decodes_lie_at_multiples_of_16_bytes(size):
    """Kernels are compiled anew for addresses that are none."""
    shape = paged.PagedShape(
        num_heads=4, num_kv_heads=2, head_dim=16, scale=1.0, sliding_window=None, page_size=16, num_pages=64,
        dtype=torch.float32, kv_dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    decode = paged._Decode(shape, paged.View(None, 0), size)
    assert all(at.start % 4 == 0 for at in decode._tables)
    assert decode.num_words >= decode._tables[-1].stop
