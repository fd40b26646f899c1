"""Launches that skip Triton's binding: the same answer, one compilation per kind of arguments."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from multilora.kernels import triton_launch
from multilora.kernels.triton_launch import Repeated, launch

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def _scale(x_ptr, out_ptr, factor, count, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i * stride, mask=i < count) * factor, mask=i < count)


@pytest.mark.parametrize("round_", range(2))  # the second time everything has been compiled
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("stride", [1, 2, 16])
def test_every_kind_of_arguments(stride: int, offset: int, round_: int) -> None:
    x = torch.arange(200.0, device=DEVICE)[offset:]
    out = torch.zeros(10, device=DEVICE)
    launch(_scale, (3,), (x, out, 0.5 + round_, 10, stride), {"BLOCK": 4}, num_warps=1)
    torch.testing.assert_close(out, x[: 10 * stride : stride] * (0.5 + round_))


class FakeKernel:
    """Counts what would be compiled, and remembers what the compiled kernel was given."""

    def __init__(self) -> None:
        self.compiled = 0
        self.given: list[tuple] = []

    def __getitem__(self, grid: tuple) -> Any:
        def compile_and_run(*args: Any, **options: Any) -> "FakeCompiled":
            self.compiled += 1
            return FakeCompiled(self)

        return compile_and_run


class FakeCompiled:
    def __init__(self, kernel: FakeKernel):
        self.kernel = kernel

    def __getitem__(self, grid: tuple) -> Any:
        return lambda *args: self.kernel.given.append((grid, *args))


def test_compiles_once_per_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_compiled", {})
    kernel, x = FakeKernel(), torch.zeros(64)
    kinds = [
        ((x, None, 32, 0.5), {"BLOCK": 4}),
        ((x[1:], None, 32, 0.5), {"BLOCK": 4}),  # not aligned
        ((x, x, 32, 0.5), {"BLOCK": 4}),
        ((x, None, 1, 0.5), {"BLOCK": 4}),
        ((x, None, 33, 0.5), {"BLOCK": 4}),
        ((x, None, 1 << 40, 0.5), {"BLOCK": 4}),
        ((x.half(), None, 32, 0.5), {"BLOCK": 4}),
        ((x, None, 32, 0.5), {"BLOCK": 8}),
    ]
    for _ in range(2):
        for args, constants in kinds:
            launch(kernel, (2,), args, constants, num_warps=1)
    assert kernel.compiled == len(kinds) == len(kernel.given)
    launch(kernel, (5, 3), (x, None, 48, 2.5), {"BLOCK": 4}, num_warps=1)  # of the first kind
    assert kernel.compiled == len(kinds)
    assert kernel.given[-1] == ((5, 3, 1), x.data_ptr(), None, 48, 2.5, 4)
    launch(kernel, (2,), (x, None, 32, 0.5), {"BLOCK": 4}, num_warps=2)
    assert kernel.compiled == len(kinds) + 1


@triton.jit(do_not_specialize=["row"])
def _add_row(x_ptr, out_ptr, row, table_ptr, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i) + tl.load(table_ptr + row * stride + i))


def test_repeated_launches_take_other_tensors_and_ints() -> None:
    table = torch.arange(64.0, device=DEVICE).view(8, 8)
    x = torch.arange(100.0, 116.0, device=DEVICE)
    again = Repeated(_add_row, (1,), (table, 8), {"BLOCK": 8}, num_warps=1)
    for row, start in ((0, 0), (1, 8), (7, 0), (2, 3)):  # the last one is not aligned
        out = torch.zeros(8, device=DEVICE)
        again((x[start : start + 8], out), row)
        assert torch.equal(out, x[start : start + 8] + table[row])


def test_repeated_launches_bind_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_compiled", {})
    kernel, x, table = FakeKernel(), torch.zeros(64), torch.zeros(8)
    again = Repeated(kernel, (2, 3), (table, 5), {"BLOCK": 4}, num_warps=1)
    again((x,), 0)
    monkeypatch.setattr(triton_launch, "launch", None)  # not asked again
    again((x[4:],), 7)
    assert kernel.compiled == 1
    assert kernel.given == [((2, 3, 1), x[4:].data_ptr(), 7, table.data_ptr(), 5, 4)]
    monkeypatch.setattr(triton_launch, "launch", launch)
    again((x[1:],), 7)  # of another kind
    again((x,), 8)
    assert kernel.compiled == 2
    assert kernel.given[-1][1:3] == (x.data_ptr(), 8)
