"""The sum over ranks, residual and norm in one kernel, against the layer's torch code."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from exchanges import DTYPES, MARKS, SIZES, everywhere, make_ranks, shares, summed

from multilora.distributed.exchange import Exchange
from multilora.layers.norm import rms_norm
from multilora.layers.triton_sum_norm import sum_add_rms_norm

pytestmark = MARKS
EPS = 1e-5


@pytest.fixture
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exchange]]:
    yield from make_ranks(request.param, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", SIZES, indirect=True)
def test_sum_residual_and_norm_in_one(ranks: list[Exchange], dtype: torch.dtype) -> None:
    parts = shares(len(ranks), 3, 48, dtype, 1)
    residual, weight = shares(2, 3, 48, dtype, 2)

    def use(rank: Exchange) -> list[torch.Tensor]:
        tensors = [t.to(rank.buffers.device) for t in (parts[rank.rank], residual, weight[0])]
        return list(sum_add_rms_norm(*tensors, EPS, rank))

    found = everywhere(ranks, use)
    total = summed(parts) + residual
    for normed, sums in found:
        assert torch.equal(sums.to(dtype), total)
        assert torch.equal(normed, found[0][0])
        normed = normed.to(dtype)
        torch.testing.assert_close(normed, rms_norm(total, weight[0], EPS), rtol=1e-2, atol=1e-2)
