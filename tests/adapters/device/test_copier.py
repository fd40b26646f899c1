"""Copies that happen at once: every page arrives, nothing else is touched."""

import pytest
import torch

from multilora.adapters.device.copier import DirectCopier, runs


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ([], []),
        ([4], [(0, 4, 1)]),
        ([4, 5, 6], [(0, 4, 3)]),
        ([4, 6, 7, 3, 2, 1], [(0, 4, 1), (1, 6, 2), (3, 3, 1), (4, 2, 1), (5, 1, 1)]),
    ],
)
def test_runs(pages: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert list(runs(pages)) == expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])])
def test_pages_arrive_at_once(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    arena = torch.full((9, 64), 7, dtype=torch.uint8, device=device)
    buffer = torch.randint(0, 256, (4, 64), dtype=torch.uint8)
    assert DirectCopier(arena).start_copy(buffer, [6, 2, 3, 8]).done()
    assert torch.equal(arena[[6, 2, 3, 8]].cpu(), buffer)
    assert bool((arena[[0, 1, 4, 5, 7]] == 7).all())
