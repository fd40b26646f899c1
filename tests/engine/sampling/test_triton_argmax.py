"""The greatest logit of each row, against torch's."""

import pytest
import torch

pytest.importorskip("triton")

from compilers import compile_elsewhere

from multilora.engine.sampling import triton_argmax
from multilora.engine.sampling.triton_argmax import argmax

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("vocab", [1, 64, 301])
def test_value_place_and_finiteness(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_argmax, "COLUMNS", 64)
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab)).bfloat16().float()  # many equals
    logits[1, vocab // 2] = INF
    logits[2, vocab // 2] = NAN
    logits[3] = -INF
    logits[4, : vocab - 1] = -INF
    best, finite, tokens = (found.cpu() for found in argmax(logits.to(DEVICE)))
    assert torch.equal(best[[0, 1, 3, 4, 5]], logits.amax(-1)[[0, 1, 3, 4, 5]]) and best[2].isnan()
    assert finite.tolist() == [True, False, False, False, True, True]
    expected = torch.from_numpy(logits.numpy().argmax(-1))  # the lowest id among equals
    assert torch.equal(tokens[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]]) and 0 <= tokens[2] < vocab


def test_rows_that_are_part_of_wider_ones() -> None:
    logits = torch.randn(3, 90)
    best, finite, tokens = argmax(logits.to(DEVICE)[:, :50])
    assert torch.equal(tokens.cpu(), logits[:, :50].argmax(-1)) and finite.all()
    assert torch.equal(best.cpu(), logits[:, :50].amax(-1))


@pytest.mark.slow
def test_the_kernels_compile_for_gpus() -> None:
    assert len(compile_elsewhere("compile_small.py", "search", "join")) == 4
