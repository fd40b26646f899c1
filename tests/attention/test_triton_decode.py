"""Decode attention against a dense loop in fp32: in Triton's interpreter, and on a GPU if there is one."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from multilora.attention import triton_decode
from multilora.attention.triton_decode import budget, cut, decode

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16]
if DEVICE.type == "cuda":  # the interpreter rounds bfloat16 towards zero
    DTYPES.append(torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
PAGE = 4


@pytest.fixture
def eager_to_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it cost nothing: so that a few tokens show all of it."""
    monkeypatch.setattr(triton_decode, "MIN_PIECE", PAGE)
    monkeypatch.setattr(triton_decode, "MERGE_TOKENS", 1)


def on_device(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).to(DEVICE)


def check(
    lens: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    window: int = 0,
    most: int = 0,
    stored: torch.dtype | None = None,
):
    """A step of requests with so many tokens (0: padding), their pages dealt at random. Returns the pieces.

    stored: dtype of the pages, if another one, which then have scales.
    """
    k_scale, v_scale = (1.0, 1.0) if stored is None else (0.25, 3.0)
    g = torch.Generator().manual_seed(sum(lens) + dim)
    tokens = np.array(lens)
    first = np.maximum(tokens - window, 0) // PAGE if window else np.zeros_like(tokens)
    pages = np.where(tokens > 0, -(-tokens // PAGE) - first, 0)
    listed = np.where(tokens > 0, tokens - first * PAGE, 0)
    skip = np.maximum(listed - window, 0) if window else np.zeros_like(listed)
    arena = torch.randn(int(pages.sum()) + 3, PAGE, 2, kv_heads, dim, generator=g).to(DEVICE, stored or dtype)
    kv = arena[:, :, 0], arena[:, :, 1]
    indices = torch.randperm(len(arena), generator=g)[: int(pages.sum())].to(DEVICE, torch.int32)
    q = torch.randn(len(lens), heads, dim, generator=g).to(DEVICE, dtype)
    plan = cut(pages, listed, skip, PAGE, most or budget(len(lens), kv_heads))
    slots = len(plan.pieces)
    out = torch.full_like(q, 7.0)
    partial = torch.full((slots, heads, dim), float("nan"), device=DEVICE)
    lse = torch.full((slots, heads), float("nan"), device=DEVICE)
    decode(
        q, kv, indices, on_device(plan.pieces), on_device(plan.spans), partial, lse, out, dim**-0.5 * k_scale, v_scale
    )
    at = 0
    for r, count in enumerate(pages):
        mine = indices[at : at + count].long()
        at += count
        if count == 0:
            assert (out[r] == 7.0).all(), "padding writes nothing"
            continue
        k, v = (t.float()[mine].flatten(0, 1)[skip[r] : listed[r]] for t in kv)  # [tokens, kv_heads, dim]
        k, v = k * k_scale, v * v_scale
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        weights = torch.einsum("hd,thd->ht", q[r].float(), k).mul(dim**-0.5).softmax(-1)
        want = torch.einsum("ht,thd->hd", weights, v)
        assert (out[r].float() - want).norm() / want.norm() < TOLERANCE[dtype]
    return plan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 1, 64), (2, 2, 32), (6, 2, 16), (8, 2, 128), (32, 1, 256)]
)
def test_against_a_dense_loop(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, eager_to_split: None) -> None:
    plan = check([1, 31, 32, 33, 4, 70], heads, kv_heads, dim, dtype, most=9)
    assert sorted(plan.spans[:, 2]) == [0, 0, 0, 0, 2, 3]  # pieces of those that are split


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_pages_of_8_bit_floats(stored: torch.dtype, eager_to_split: None) -> None:
    check([1, 31, 0, 70], 6, 2, 16, DTYPES[-1], most=6, stored=stored)


def test_a_long_request_among_short_ones_is_split() -> None:
    plan = check([5, 900, 0, 3], 4, 2, 16, torch.float32, most=12)
    [split] = plan.spans[plan.spans[:, 2] > 0]
    assert split[0] == 1 and split[2] > 3
    assert (np.diff(plan.pieces[:, 2]) <= 0).all(), "the longest first"


def test_more_pieces_than_are_put_together_at_a_time(monkeypatch: pytest.MonkeyPatch, eager_to_split: None) -> None:
    monkeypatch.setattr(triton_decode, "MERGE_ELEMENTS", 4 * 16)
    plan = check([3, 70, 41], 4, 2, 16, torch.float32, most=20)
    assert plan.spans[:, 2].max() > 8


@pytest.mark.parametrize(
    ("lens", "split"),
    [
        ([576] * 64, 0),
        ([512 + 2 * i for i in range(64)], 0),
        ([540] * 32, 0),
        ([560] * 16, 16),
        ([2000], 1),
        ([190], 1),
        ([170], 0),
        ([200] * 63 + [8000], 1),
        ([200] * 40 + [3000] * 17, 0),
    ],
    ids=lambda x: f"{min(x)}-{max(x)} of {len(x)}" if isinstance(x, list) else None,
)
def test_who_is_split(lens: list[int], split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it pays: measured on an H100 with 8 KV heads (docs/log.md)."""
    monkeypatch.setattr(triton_decode, "PROGRAMS", 264)
    tokens = np.array(lens)
    plan = cut(-(-tokens // 16), tokens, np.zeros_like(tokens), 16, budget(len(lens), 8))
    assert (plan.spans[:, 2] > 0).sum() == split


@pytest.mark.parametrize("window", [1, 7, 64, 1000])
def test_windows(window: int, eager_to_split: None) -> None:
    check([1, 9, 40, 260], 2, 1, 16, torch.float32, window=window, most=9)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_cover_every_page_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(triton_decode, "MERGE_TOKENS", int(rng.choice([1, 128])))
    pages = rng.integers(0, 200, rng.integers(1, 40)) * rng.integers(0, 2, 1) + 1
    tokens = pages * 16 - rng.integers(0, 16, len(pages))
    most = budget(len(pages), 8)
    plan = cut(pages, tokens, np.zeros_like(pages), 16, most)
    used = plan.pieces[plan.pieces[:, 2] > 0]
    starts = np.cumsum(pages) - pages
    spans = {row: (first, count) for row, first, count in plan.spans if count}
    for r in range(len(pages)):
        own = used[used[:, 0] == r]
        own = own[np.argsort(own[:, 1])]
        assert own[0, 1] == starts[r] and own[:, 2].sum() == tokens[r]
        assert (own[1:, 1] == own[:-1, 1] + own[:-1, 2] // 16).all()
        first, count = spans.get(r, (0, 0))
        assert count == (len(own) if len(own) > 1 else 0)
        assert own[:, 4].tolist() == (list(range(first, first + count)) if count else [-1])


def test_few_requests_fill_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_decode, "PROGRAMS", 264)
    plan = cut(np.array([500]), np.array([8000]), np.array([0]), 16, budget(1, 8))
    assert plan.spans[0, 2] > 30
