"""The routing kernels against the torch code that they stand for: in Triton's interpreter, and on a GPU if there is
one."""

import pytest
import torch

pytest.importorskip("triton")

from multilora.layers import triton_routing as fused
from multilora.layers.experts import route, sort_by_expert

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("tokens", "count", "top_k"), [(1, 8, 2), (3, 60, 4), (5, 128, 8), (2, 4, 1), (2, 7, 6)])
def test_which_experts_a_token_takes(tokens: int, count: int, top_k: int, normalised: bool) -> None:
    logits = 3 * random(tokens, count)
    for dtype in (torch.float32, torch.float16):
        expected = route(logits, top_k, normalised=normalised, dtype=dtype)
        experts, weights = fused.route(logits.to(DEVICE), top_k, normalised=normalised, dtype=dtype)
        assert torch.equal(experts.cpu(), expected[0]) and weights.dtype == dtype
        torch.testing.assert_close(weights.cpu(), expected[1], atol=0, rtol=1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_the_first_of_equals_is_taken_and_numbers_that_are_none_name_an_expert() -> None:
    logits = torch.zeros(2, 5, device=DEVICE)
    logits[0, 3] = 1.0
    logits[1] = float("nan")
    experts, weights = fused.route(logits, 3, normalised=True, dtype=torch.float32)
    assert experts[0].tolist() == [3, 0, 1]
    assert ((experts >= 0) & (experts < 5)).all()
    assert weights[1].isnan().all()


@pytest.mark.parametrize("held", [None, range(2, 5)])
@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize(("tokens", "top_k", "count"), [(1, 1, 6), (3, 2, 6), (40, 4, 70), (150, 3, 9)])
def test_the_order_of_rows(tokens: int, top_k: int, count: int, with_segments: bool, held: range | None) -> None:
    experts = random(tokens, count).topk(top_k).indices
    segments = None
    if with_segments:
        segments = torch.randint(0, 4, (tokens,), generator=torch.Generator().manual_seed(1))
    expected = sort_by_expert(experts, count, segments, held)
    found = fused.sort_by_expert(experts.to(DEVICE), count, None if segments is None else segments.to(DEVICE), held)
    for name in ("tokens", "experts", "ends", "places", "segments"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        if theirs is None:
            assert ours is None
        else:
            assert ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs), name
