"""FP8 products of a few rows against their definition: in Triton's interpreter, and on a GPU if there is one."""

import pytest
import torch

pytest.importorskip("triton")

from multilora.layers import triton_fp8_rows as fused
from multilora.layers.weights import fp8_arithmetic as defined

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCKS = {
    "as chosen": None,
    "weight first": fused.RowBlocks(16, 64, 64, swapped=True),
    "tall": fused.RowBlocks(64, 32, 128, swapped=False),
    "columns shared": fused.RowBlocks(16, 64, 64, swapped=True, splits=4),
    "columns shared by three": fused.RowBlocks(16, 32, 64, swapped=False, splits=3),
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("rows", [1, 5, 17, 64])
@pytest.mark.parametrize(("outs", "width"), [(96, 512), (40, 200)])
def test_a_few_rows(outs: int, width: int, rows: int, blocks: str) -> None:
    x, x_scale = defined.quantise(random(rows, width))
    weight, scale = defined.saturated(100 * random(outs, width)), random(outs, 1).abs()
    expected = defined.rows_product(x, x_scale, weight, scale, torch.float32)
    given = (t.to(DEVICE) for t in (x, x_scale, weight, scale))
    found = fused.few_rows_product(*given, torch.float32, BLOCKS[blocks])
    error = (found.cpu() - expected).norm() / expected.norm()
    assert error < (1e-3 if DEVICE.type == "cuda" else 1e-6), "Hopper rounds within 32 columns"


def test_programs_that_share_columns_leave_nothing_behind() -> None:
    """So the next product, of other sizes, is right, too."""
    blocks = fused.RowBlocks(16, 32, 64, swapped=False, splits=2)
    for outs in (64, 40, 64):
        x, x_scale = defined.quantise(random(3, 256))
        weight, scale = defined.saturated(100 * random(outs, 256)), random(outs, 1).abs()
        given = [t.to(DEVICE) for t in (x, x_scale, weight, scale)]
        first, again = (fused.few_rows_product(*given, torch.float32, blocks).cpu() for _ in range(2))
        assert torch.equal(first, again)
        assert not fused._scratch[DEVICE if DEVICE.type == "cpu" else given[0].device][1].any()


def test_what_is_too_large_to_be_shared_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_scratch", {})
    monkeypatch.setattr(fused, "SCRATCH_BYTES", 64)
    x, x_scale = defined.quantise(random(3, 256))
    weight, scale = defined.saturated(100 * random(64, 256)), random(64, 1).abs()
    expected = defined.rows_product(x, x_scale, weight, scale, torch.float32)
    given = (t.to(DEVICE) for t in (x, x_scale, weight, scale))
    found = fused.few_rows_product(*given, torch.float32, fused.RowBlocks(16, 32, 64, swapped=False, splits=2))
    assert (found.cpu() - expected).norm() < 1e-3 * expected.norm()


def test_blocks_by_rows_and_shape() -> None:
    assert fused.blocks_of(1, 64, 64) == fused.FEW[16][0]
    assert fused.blocks_of(17, fused.WIDE, 64) == fused.FEW[64][2]
    assert fused.blocks_of(64, 64, fused.DEEP) == fused.FEW[64][1]
