"""Paged attention against a dense loop, over odd sizes, windows, dtypes and batches of every mixture."""

import math
import random
from dataclasses import dataclass

import pytest
import torch
from cpp import NEEDS_CPP

from multilora.attention.base import AttentionShape
from multilora.attention.cpp_attention import CppAttention
from multilora.attention.torch_sdpa import TorchAttention
from multilora.batch import AttentionMeta
from multilora.memory.kv_layout import KVLayout

LAYERS = 2


@dataclass
class Case:
    """A batch of requests with cached prefixes, its arena, and the dense history that the arena holds."""

    meta: AttentionMeta
    views: list[tuple[torch.Tensor, torch.Tensor]]
    history: list[torch.Tensor]  # per request [layers, k|v, kv_len, kv_heads, head_dim]


def make_case(
    lens: list[tuple[int, int]], page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0
) -> Case:
    """lens: (new tokens, tokens in all). Unwritten slots hold NaN; pages are dealt at random over the arena."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layout = KVLayout(LAYERS, page_size, kv_heads, head_dim, dtype)
    counts = [layout.pages_for(total) for _, total in lens]
    arena = torch.zeros(sum(counts) + 5, layout.page_bytes, dtype=torch.uint8)
    views = layout.views(arena)
    for k, v in views:
        k.fill_(torch.nan)
        v.fill_(torch.nan)
    deck = list(range(arena.shape[0]))
    rng.shuffle(deck)
    table = torch.zeros(len(lens), max(counts) + 2, dtype=torch.int64)
    history, token_page, token_slot = [], [], []
    for r, (new, total) in enumerate(lens):
        pages = [deck.pop() for _ in range(counts[r])]
        table[r, : len(pages)] = torch.tensor(pages)
        kv = torch.randn(LAYERS, 2, total, kv_heads, head_dim, generator=generator).to(dtype)
        history.append(kv)
        cached = total - new
        if cached % page_size:  # a page that has been begun is finite, as the backend itself leaves it
            for view in (v for pair in views for v in pair):
                view[pages[cached // page_size]] = 0
        for token in range(total):
            page, slot = pages[token // page_size], token % page_size
            if token >= cached:
                token_page.append(page)
                token_slot.append(slot)
                continue
            for layer in range(LAYERS):
                views[layer][0][page, slot] = kv[layer, 0, token]
                views[layer][1][page, slot] = kv[layer, 1, token]
    new_lens, kv_lens = zip(*lens, strict=True)
    meta = AttentionMeta(new_lens, kv_lens, table, torch.tensor(token_page), torch.tensor(token_slot))
    return Case(meta, views, history)


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One request the slow way, in fp64. q: [new, heads, head_dim]; k, v: [total, kv_heads, head_dim]."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q, dtype=torch.float64)
    for i in range(q.shape[0]):
        last = k.shape[0] - q.shape[0] + i
        first = 0 if window is None else max(0, last - window + 1)
        for h in range(q.shape[1]):
            keys, values = (t[first : last + 1, h // group].double() for t in (k, v))
            scores = keys @ q[i, h].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks[h : h + 1].double()))
            out[i, h] = torch.softmax(scores, 0)[: len(values)] @ values
    return out


def unrotated(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of angle 0: rotation has its own tests."""
    return torch.ones(k.shape[0], 1, k.shape[2] // 2), torch.zeros(k.shape[0], 1, k.shape[2] // 2)


def run(
    case: Case,
    heads: int,
    window: int | None,
    atol: float,
    computed_in: torch.dtype | None = None,
    backend: type[TorchAttention] = TorchAttention,
) -> None:
    """computed_in: dtype of q, k and v; None: that of the cache."""
    kv_heads, head_dim = case.views[0][0].shape[2:]
    scale = 0.7 / math.sqrt(head_dim)
    attention = backend(case.views, AttentionShape(heads, kv_heads, head_dim, scale, window))
    attention.prepare(case.meta)
    generator = torch.Generator().manual_seed(1)
    for layer in range(LAYERS):
        new = [h[layer, :, h.shape[2] - n :] for h, n in zip(case.history, case.meta.q_lens, strict=True)]
        k, v = torch.cat(new, dim=1)
        if computed_in is not None:
            k, v = (t.to(computed_in) * (1 + 2**-12) for t in (k, v))
        q = torch.randn(k.shape[0], heads, head_dim, generator=generator).to(k.dtype)
        got = attention.forward(layer, q, k, v, unrotated(k))
        assert got.dtype == q.dtype
        want = [
            dense(part, h[layer, 0], h[layer, 1], scale, window)
            for part, h in zip(q.split(case.meta.q_lens), case.history, strict=True)
        ]
        torch.testing.assert_close(got.double(), torch.cat(want), atol=atol, rtol=0)
    check_pages(case)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_pages_of_8_bit_floats(stored: torch.dtype, softcap: float | None) -> None:
    """Keys and values are what is stored of them, times their scales, the new ones too."""
    scales = ((0.5, 0.25), (1.0, 4.0))
    case = make_case([(1, 9), (5, 5), (3, 11), (1, 1)], 4, 2, 8, torch.float32)
    layout = KVLayout(LAYERS, 4, 2, 8, stored)
    views = layout.views(torch.zeros(len(case.views[0][0]), layout.page_bytes, dtype=torch.uint8))
    for layer, pair in enumerate(views):
        for pages, wide, scale in zip(pair, case.views[layer], scales[layer], strict=True):
            pages.view(torch.uint8).copy_((wide / scale).to(stored).view(torch.uint8))
    shape = AttentionShape(4, 2, 8, 0.3, None, softcap=softcap, kv_scales=scales)
    attention = TorchAttention(views, shape)
    attention.prepare(case.meta)
    for layer in range(LAYERS):
        new = [h[layer, :, h.shape[2] - n :] for h, n in zip(case.history, case.meta.q_lens, strict=True)]
        k, v = torch.cat(new, dim=1)
        q = torch.randn(len(k), 4, 8, generator=torch.Generator().manual_seed(2))
        got = attention.forward(layer, q, k, v, unrotated(k))
        held = [[(h[layer, i] / s).to(stored).float() * s for i, s in enumerate(scales[layer])] for h in case.history]
        want = [
            dense(part, *kv, 0.3, None, softcap) for part, kv in zip(q.split(case.meta.q_lens), held, strict=True)
        ]
        torch.testing.assert_close(got.double(), torch.cat(want), atol=1e-5, rtol=1e-5)


def check_pages(case: Case) -> None:
    """The arena now holds the whole history of every request, at its place."""
    for r, h in enumerate(case.history):
        page_size = case.views[0][0].shape[1]
        pages = case.meta.page_table[r, : -(-h.shape[2] // page_size)]
        for layer, views in enumerate(case.views):
            for which, view in enumerate(views):
                assert torch.equal(view[pages].flatten(0, 1)[: h.shape[2]], h[layer, which])


BATCHES = {
    "one token": [(1, 1)],
    "one decode": [(1, 18)],
    "decodes": [(1, 5), (1, 33), (1, 1), (1, 16), (1, 17), (1, 90)],
    "fresh prefill": [(13, 13), (2, 2), (32, 32)],
    "chunks": [(5, 20), (7, 8), (16, 48), (2, 33)],
    "everything": [(1, 40), (9, 9), (1, 3), (6, 50), (1, 97), (3, 16), (1, 1)],
}


EVERY_BACKEND = pytest.mark.parametrize("backend", [TorchAttention, pytest.param(CppAttention, marks=NEEDS_CPP)])


@EVERY_BACKEND
@pytest.mark.parametrize("window", [None, 1, 6, 16, 1000])
@pytest.mark.parametrize("batch", BATCHES)
def test_batches_and_windows(batch: str, window: int | None, backend: type[TorchAttention]) -> None:
    run(make_case(BATCHES[batch], 8, 2, 16, torch.float32), 6, window, atol=1e-5, backend=backend)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 8), (4, 4, 24), (8, 1, 64), (15, 3, 40)])
@pytest.mark.parametrize("page_size", [1, 5, 16])
@EVERY_BACKEND
def test_shapes(heads: int, kv_heads: int, head_dim: int, page_size: int, backend: type[TorchAttention]) -> None:
    case = make_case(BATCHES["everything"], page_size, kv_heads, head_dim, torch.float32)
    run(case, heads, 7, atol=1e-5, backend=backend)


@pytest.mark.parametrize(
    ("backend", "dtype", "atol"),
    [
        (TorchAttention, torch.float64, 1e-12),
        (TorchAttention, torch.bfloat16, 3e-2),
        (TorchAttention, torch.float16, 4e-3),
        pytest.param(CppAttention, torch.bfloat16, 3e-2, marks=NEEDS_CPP),
        pytest.param(CppAttention, torch.float16, 4e-3, marks=NEEDS_CPP),
    ],
)
def test_dtypes(backend: type[TorchAttention], dtype: torch.dtype, atol: float) -> None:
    run(make_case(BATCHES["everything"], 16, 2, 32, dtype), 4, None, atol, backend=backend)


def test_keys_and_values_are_rounded_to_the_dtype_of_the_cache_wherever_they_are_read_from() -> None:
    """Queries in fp32 over a bf16 cache; what the layer brings rounds to what is in the history."""
    run(make_case(BATCHES["everything"], 16, 2, 32, torch.bfloat16), 4, None, 1e-5, computed_in=torch.float32)


@EVERY_BACKEND
@pytest.mark.parametrize("seed", range(20))
def test_random_batches(seed: int, backend: type[TorchAttention]) -> None:
    rng = random.Random(seed)
    lens = []
    for _ in range(rng.randint(1, 9)):
        total = rng.randint(1, 60)
        lens.append((rng.choice([1, 1, rng.randint(1, total)]), total))
    window = rng.choice([None, rng.randint(1, 40)])
    run(make_case(lens, rng.choice([2, 4, 16]), 2, 8, torch.float32, seed), 4, window, atol=1e-5, backend=backend)


def test_padding_stays_bounded() -> None:
    """Short decodes do not pay for a long one beside them."""
    lens = [(1, 400)] + [(1, 10)] * 30
    case = make_case(lens, 4, 1, 8, torch.float32)
    attention = TorchAttention(case.views, AttentionShape(1, 1, 8, 1.0, None))
    attention.prepare(case.meta)
    gathered = sum(d.pages[0].numel() for d in attention._plans[None].decodes)
    needed = sum(-(-total // 4) for _, total in lens)
    assert needed <= gathered <= 2 * needed
    assert len(attention._plans[None].decodes) == 2


def test_decodes_that_are_neighbours_are_read_in_place() -> None:
    """Their rows of q are a slice, whatever their lengths; what a prefill or another group parts is gathered."""
    for lens, neighbours in (
        ([(1, 10), (1, 17), (1, 12)], [True]),
        ([(3, 3), (1, 10), (1, 17)], [True]),
        ([(1, 10), (2, 9), (1, 12)], [False]),
        ([(1, 10), (1, 200), (1, 12)], [True, False]),
    ):
        case = make_case(lens, 4, 1, 8, torch.float32)
        attention = TorchAttention(case.views, AttentionShape(1, 1, 8, 1.0, None))
        attention.prepare(case.meta)
        assert [isinstance(d.rows, slice) for d in attention._plans[None].decodes] == neighbours


def test_all_layers_gather_into_the_same_memory() -> None:
    """Nothing of a decode step's keys and values is allocated layer by layer, nor left for the layer behind it."""
    case = make_case([(1, 10), (1, 17)], 4, 1, 8, torch.float32)
    attention = TorchAttention(case.views, AttentionShape(1, 1, 8, 1.0, None))
    attention.prepare(case.meta)
    [plan] = attention._plans[None].decodes
    outs = []
    for layer in (0, 1, 0):
        new = [h[layer, :, h.shape[2] - 1 :] for h in case.history]
        k, v = torch.cat(new, dim=1)
        outs.append(attention.forward(layer, torch.ones(2, 1, 8), k, v, unrotated(k)))
        assert plan.gathered[0].shape == (2 * 5, 4, 1, 8)
        assert torch.equal(plan.gathered[0].flatten(0, 1)[20:37, 0], case.history[1][layer, 0, :, 0])
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])


def test_window_reads_no_page_before_it() -> None:
    case = make_case([(1, 400)], 4, 1, 8, torch.float32)
    attention = TorchAttention(case.views, AttentionShape(1, 1, 8, 1.0, 10))
    attention.prepare(case.meta)
    [plan] = attention._plans[10].decodes
    assert plan.pages[0].numel() <= 4


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@EVERY_BACKEND
def test_layers_with_windows_of_their_own_softcap_and_sinks(
    softcap: float | None, with_sinks: bool, backend: type[TorchAttention]
) -> None:
    case = make_case(BATCHES["everything"], 8, 2, 16, torch.float32)
    windows = (7, None)
    sinks = torch.linspace(-1, 3, 6) if with_sinks else None
    shape = AttentionShape(6, 2, 16, 0.3, None, windows, softcap, with_sinks)
    attention = backend(case.views, shape)
    attention.prepare(case.meta)
    for layer, window in enumerate(windows):
        new = [h[layer, :, h.shape[2] - n :] for h, n in zip(case.history, case.meta.q_lens, strict=True)]
        k, v = torch.cat(new, dim=1)
        q = torch.randn(k.shape[0], 6, 16, generator=torch.Generator().manual_seed(layer))
        got = attention.forward(layer, q, k, v, unrotated(k), sinks)
        want = [
            dense(part, h[layer, 0], h[layer, 1], 0.3, window, softcap, sinks)
            for part, h in zip(q.split(case.meta.q_lens), case.history, strict=True)
        ]
        torch.testing.assert_close(got.double(), torch.cat(want), atol=1e-5, rtol=0)
    check_pages(case)
