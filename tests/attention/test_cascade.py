"""Pages that decodes share are read once for all of them, and the answers are what the torch backend gives, in fp32.

In Triton's interpreter, and on a GPU if there is one. Covers `triton_cascade.py` too.
"""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from compilers import compile_elsewhere
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.attention import cascade, triton_cascade, triton_decode
from multilora.attention.base import AttentionShape
from multilora.attention.cascade import plan
from multilora.attention.torch_sdpa import TorchAttention
from multilora.attention.triton_attention import TritonAttention
from multilora.batch import AttentionMeta, SharedPages
from multilora.memory.kv_layout import KVLayout

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16]
if DEVICE.type == "cuda":  # the interpreter rounds bfloat16 towards zero
    DTYPES.append(torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
PAGE = 4


@pytest.fixture(autouse=True)
def eager_to_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut stretches and long decodes into pieces as if it cost nothing."""
    for module in (cascade, triton_decode):
        monkeypatch.setattr(module, "MIN_PIECE", PAGE)
    monkeypatch.setattr(triton_decode, "MERGE_TOKENS", 1)


def error(
    lens: list[tuple[int, int]],
    shared: tuple[SharedPages, ...],
    heads: tuple[int, int, int] = (4, 2, 16),
    dtype: torch.dtype = torch.float32,
    **kind: object,
) -> float:
    """The largest error of a row, of two layers. lens: new tokens and all of them; heads: query heads, KV heads,
    head_dim. Pages are dealt at random and full of random numbers."""
    num_heads, kv_heads, dim = heads
    rng, g = random.Random(len(lens)), torch.Generator().manual_seed(dim)
    shape = AttentionShape(num_heads, kv_heads, dim, 0.3, None, **kind)  # type: ignore[arg-type]
    layout = KVLayout(2, PAGE, kv_heads, dim, dtype)
    counts = [-(-total // PAGE) for _, total in lens]
    deck = list(range(sum(counts) + 5))
    rng.shuffle(deck)
    table = torch.zeros(len(lens), max(counts) + 2, dtype=torch.int64)
    for r, count in enumerate(counts):
        table[r, :count] = torch.tensor([deck.pop() for _ in range(count)])
    for one in shared:
        stretch = slice(one.first, one.first + one.blocks)
        table[list(one.requests), stretch] = table[one.requests[0], stretch].clone()
    places = [(r, t) for r, (new, total) in enumerate(lens) for t in range(total - new, total)]
    token_page = torch.tensor([int(table[r, t // PAGE]) for r, t in places])
    slots = torch.tensor([t % PAGE for _, t in places])
    q_lens, kv_lens = zip(*lens, strict=True)
    meta = AttentionMeta(q_lens, kv_lens, *(t.to(DEVICE) for t in (table, token_page, slots)), shared=shared)
    angle = torch.randn(len(places), 1, dim // 2, generator=g).to(DEVICE)
    rope = angle.cos(), angle.sin()
    qkv = torch.randn(2, len(places), num_heads + 2 * kv_heads, dim, generator=g).to(DEVICE, dtype)
    sinks = torch.randn(num_heads, generator=g).to(DEVICE, dtype) if shape.sinks else None
    pages = torch.randn(len(deck) + sum(counts) + 5, layout.page_bytes // dtype.itemsize, generator=g).to(
        DEVICE, dtype
    )
    found = []
    for wide in (True, False):
        kept = torch.float32 if wide else dtype
        views = replace(layout, dtype=kept).views(pages.to(kept).view(torch.uint8).clone())
        attention = TorchAttention(views, shape) if wide else TritonAttention(views, shape)
        attention.prepare(meta)
        rows = qkv.to(kept).split([num_heads, kv_heads, kv_heads], dim=2)
        given = None if sinks is None else sinks.to(kept)
        found.append([attention.forward(i, *(part[i] for part in rows), rope, given).float() for i in (0, 1)])
    errors = [
        (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1) for want, got in zip(*found, strict=True)
    ]
    return float(torch.stack(errors).max())


ALL = SharedPages((0, 1, 2, 3, 4), 0, 5)
NESTED = (ALL, SharedPages((1, 3, 4), 5, 3), SharedPages((0, 2), 5, 2))
LENS = [(1, 29), (1, 40), (1, 33), (1, 35), (1, 61)]


HEADS = [(4, 2, 16), (6, 2, 32), (3, 3, 16), (8, 1, 64)]


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        pytest.param(heads, dtype, marks=() if i % len(DTYPES) == j else pytest.mark.slow)
        for i, heads in enumerate(HEADS)
        for j, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
def test_against_torch(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert error(LENS, NESTED, heads, dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", [{"softcap": 1.5}, {"sinks": True}], ids=str)
def test_softcaps_and_sinks(kind: dict[str, object]) -> None:
    assert error(LENS, NESTED, **kind) < TOLERANCE[torch.float32]


def test_beside_prompts_and_decodes_that_share_nothing() -> None:
    lens = [(1, 50), (9, 9), (1, 29), (3, 20), (1, 28), (1, 3), (1, 31)]
    assert error(lens, (SharedPages((2, 4, 6), 0, 6),)) < TOLERANCE[torch.float32]


def test_more_requests_than_a_piece_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_cascade, "TILE", 8)  # four requests of two heads each
    shared = (SharedPages(tuple(range(10)), 0, 3),)
    assert error([(1, 13 + i) for i in range(10)], shared) < TOLERANCE[torch.float32]


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=9),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 2**32),
)
def test_every_token_of_every_request_is_read_once(lens: list[int], kv_heads: int, members: int, seed: int) -> None:
    """And every partial result has a slot of its own, those of a request beside each other."""
    rng = random.Random(seed)
    tokens = np.array(lens)
    pages = -(-tokens // PAGE)
    whole = (tokens - 1) // PAGE
    shared, together = [], list(range(len(lens)))
    first = 0
    while len(together) > 1 and (most := int(whole[together].min())) > first:
        blocks = rng.randint(1, most - first)
        shared.append(SharedPages(tuple(together), first, blocks))
        first += blocks
        together = sorted(rng.sample(together, rng.randint(1, len(together))))
    tables = plan(pages, tokens, shared, PAGE, kv_heads, members)
    starts = np.cumsum(pages) - pages
    read: dict[int, list[int]] = {r: [] for r in range(len(lens))}  # positions
    slots: dict[int, list[int]] = {r: [] for r in range(len(lens))}
    for row, start, count, skip, slot in tables.own.tolist():
        position = (start - starts[row]) * PAGE
        assert skip == 0
        read[row] += range(position, position + count)
        slots[row].append(slot)
    for start, count, members_of, _, *rest in tables.shared.tolist():
        rows, own_slots = rest[:members_of], rest[members : members + members_of]
        position = (start - starts[rows[0]]) * PAGE
        for row, slot in zip(rows, own_slots, strict=True):
            read[row] += range(position, position + count)
            slots[row].append(slot)
    assert all(sorted(read[r]) == list(range(n)) for r, n in enumerate(lens))
    spans = {row: range(first, first + count) for row, first, count in tables.spans.tolist()}
    for row, taken in slots.items():
        assert sorted(taken) == (list(spans[row]) if row in spans else [-1])
    assert sorted(slot for span in spans.values() for slot in span) == list(range(tables.slots))


CASES = [f"cascade4 bf16 bf16 {dim} {capability}" for capability in (80, 89, 90) for dim in (64, 128, 256)]
CASES += ["cascade1 bf16 bf16 128 90", "cascade7 bf16 bf16 64 89", "cascade8 fp16 fp8e4nv 128 89"]
CASES += ["cascade4 fp16 fp8e4nv 256 90", "cascade2 fp32 fp32 128 90"]


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_and_fits_in_them() -> None:
    lines = compile_elsewhere("compile_attention.py", lines="\n".join(CASES))
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [" ".join(one["case"]) for one in found] == CASES
    assert [one for one in found if not 0 < one["shared"] <= one["most"]] == []
