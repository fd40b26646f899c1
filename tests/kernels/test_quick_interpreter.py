"""The quicker interpreter of the tests (`tests/support`) computes what Triton's own does."""

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled here", allow_module_level=True)

import quick_interpreter
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterOptions

quick = {name: getattr(interpreter, name) for name in quick_interpreter.REPLACED}


@pytest.fixture(params=["quick", "own"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "own":
        for name, part in quick_interpreter.own.items():
            monkeypatch.setattr(interpreter, name, part)
        options = InterpreterOptions()
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    return request.param


@triton.jit
def _doubled(x):
    return tl.where(x > 0, x * 2, 0)


@triton.jit
def _kernel(x_ptr, y_ptr, out_ptr, size, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i, mask=i < size, other=0)
    y = tl.load(y_ptr + i[:, None] * SIZE + i[None, :])
    product = tl.dot(y, y).to(tl.float32)
    best = tl.max(product, 1) + tl.sum(_doubled(x), 0) + tl.cdiv(size, 4)
    tl.store(out_ptr + i, best.to(tl.float16), mask=i < size)


@triton.jit
def _twice(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) + tl.load(x_ptr))


def test_the_replacements_are_in_place() -> None:
    assert quick["_patch_lang"] is not quick_interpreter.own["_patch_lang"], "Triton's interpreter has changed"
    assert not interpreter.interpreter_builder.options.sanitize_overflow
    assert InterpreterOptions().sanitize_overflow
    assert not InterpreterOptions().debug, "it would be asserted"


def test_numbers(kind: str) -> None:
    x, y = torch.arange(-8, 8, dtype=torch.int32), torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(16, dtype=torch.float16)
    for _ in range(2):
        _kernel[(1,)](x, y, out, 13, SIZE=16)
    want = (y @ y).amax(1) + x[:13].clamp(min=0).sum() * 2 + 4
    torch.testing.assert_close(out[:13], want.half()[:13], rtol=1e-3, atol=0)
    assert not out[13:].any()


def test_the_language_is_as_before_afterwards(kind: str) -> None:
    before = tl.load, tl.tensor.__add__, tl.range
    out = torch.zeros(1)
    _twice[(1,)](torch.ones(1), out)
    assert out.item() == 2
    assert (tl.load, tl.tensor.__add__, tl.range) == before
