"""Sums over ranks through each other's memory.

Covers `triton_exchange.py` too.
"""

import threading
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from exchanges import DTYPES, MARKS, ON_GPU, SIZES, everywhere, make_ranks, shares, summed

from multilora.distributed import triton_exchange
from multilora.distributed.exchange import Exchange
from multilora.distributed.triton_exchange import SLOTS

pytestmark = MARKS


@pytest.fixture
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exchange]]:
    yield from make_ranks(request.param, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", SIZES, indirect=True)
def test_sums_are_the_same_bits_everywhere(ranks: list[Exchange], dtype: torch.dtype) -> None:
    """Call after call, with other numbers of rows: a slot takes its halves in turns, and may be left out."""
    columns = 40 if dtype is torch.float32 else 80
    for seed, rows in enumerate((1, 3, 1, 2)):
        parts = shares(len(ranks), rows, columns, dtype, seed)
        found = everywhere(ranks, lambda r, parts=parts: [r.all_reduce(parts[r.rank].to(r.buffers.device))])
        assert all(torch.equal(each.to(dtype), summed(parts)) for [each] in found)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_more_rows_than_slots(ranks: list[Exchange], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program sends row after row through its slot."""
    rows = SLOTS + 3
    if not ON_GPU:
        monkeypatch.setattr(triton_exchange, "SLOTS", 2)
        rows = 7
    parts = shares(2, rows, 16, torch.float32, 0)
    for _ in range(2):
        found = everywhere(ranks, lambda r: [r.all_reduce(parts[r.rank].to(r.buffers.device))])
        assert all(torch.equal(each, summed(parts)) for [each] in found)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_what_fits(ranks: list[Exchange]) -> None:
    fits = ranks[0].fits
    assert fits(torch.empty(256, 128, dtype=torch.float16)) and fits(torch.empty(1, 64))
    assert not fits(torch.empty(257, 128, dtype=torch.float16)), "rows"
    assert not fits(torch.empty(1, 130, dtype=torch.float16)) and not fits(torch.empty(1, 65)), "wide"
    assert not fits(torch.empty(1, 7, dtype=torch.float16)), "half a word"
    assert not fits(torch.empty(4, 2, 8)) and not fits(torch.empty(8, 4).T) and not fits(torch.empty(1, 8).double())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_nobody_waits_for_ever_for_a_rank_that_is_gone(ranks: list[Exchange]) -> None:
    alone = ranks[0]
    if ON_GPU:
        torch.cuda.set_device(0)
    timer = threading.Timer(0.3, alone.close)
    timer.start()
    alone.all_reduce(torch.ones(2, 16, device=alone.buffers.device))
    if ON_GPU:
        torch.cuda.synchronize()
    timer.join()
    assert alone.counts.tolist() == [1, 1, *[0] * (SLOTS - 2)]
