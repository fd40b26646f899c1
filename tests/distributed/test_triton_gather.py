"""Columns of all ranks side by side, through each other's memory."""

import threading
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from compilers import compile_elsewhere
from exchanges import GATHERED, MARKS, ON_GPU, SIZES, everywhere, make_ranks, shares

from multilora.distributed import triton_gather
from multilora.distributed.exchange import Exchange
from multilora.distributed.partition import padded_part, padded_size

pytestmark = MARKS


@pytest.fixture
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exchange]]:
    yield from make_ranks(request.param, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", SIZES, indirect=True)
def test_call_after_call_with_other_shapes(ranks: list[Exchange], monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves are taken in turns; parts are padded, the last ones may be all padding; rows have several blocks."""
    if not ON_GPU:
        monkeypatch.setattr(triton_gather, "BLOCK", 32)
    size = len(ranks)
    for seed, (rows, columns) in enumerate(((1, 100), (3, 64 * size), (2, 17), (1, 3), (5, 161))):
        parts = shares(size, rows, padded_size(columns, size), torch.float32, seed)
        expected = [part[:, : len(padded_part(columns, i, size))] for i, part in enumerate(parts)]

        def gather(r: Exchange, parts: list[torch.Tensor] = parts, columns: int = columns) -> list[torch.Tensor]:
            return [r.gather_columns(parts[r.rank].to(r.buffers.device), columns)]

        for [found] in everywhere(ranks, gather):
            assert torch.equal(found, torch.cat(expected, dim=1))


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_beside_sums(ranks: list[Exchange]) -> None:
    """They share the memory and do not touch each other's."""
    parts = shares(2, 2, 16, torch.float32, 0)

    def both(r: Exchange) -> list[torch.Tensor]:
        own = parts[r.rank].to(r.buffers.device)
        return [r.all_reduce(own), r.gather_columns(own, 32), r.all_reduce(own), r.gather_columns(own, 30)]

    side_by_side, total = torch.cat(parts, dim=1), parts[0] + parts[1]
    for found in everywhere(ranks, both):
        assert torch.equal(found[0], total) and torch.equal(found[2], total)
        assert torch.equal(found[1], side_by_side) and torch.equal(found[3], side_by_side[:, :30])


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_what_fits(ranks: list[Exchange]) -> None:
    fits = ranks[0].fits_gathering
    assert fits(torch.empty(2, GATHERED // 2)) and not fits(torch.empty(1, GATHERED + 1))
    assert not fits(torch.empty(2, 8, dtype=torch.float16)) and not fits(torch.empty(8, 2).T)


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_nobody_waits_for_ever_for_a_rank_that_is_gone(ranks: list[Exchange]) -> None:
    alone = ranks[0]
    alone.gather_counts = alone.gather_counts[:2]  # programs, which the interpreter has wait one after the other
    if ON_GPU:
        torch.cuda.set_device(0)
    timer = threading.Timer(0.3, alone.close)
    timer.start()
    alone.gather_columns(torch.ones(1, 16, device=alone.buffers.device), 32)
    if ON_GPU:
        torch.cuda.synchronize()
    timer.join()


@pytest.mark.slow
def test_it_compiles_for_gpus() -> None:
    assert len(compile_elsewhere("compile_small.py", "gather")) == 2
