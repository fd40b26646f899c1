"""FP8 kernels against their definition: in Triton's interpreter, and on a GPU if there is one."""

import pytest
import torch

pytest.importorskip("triton")

from multilora.layers import triton_fp8 as fused
from multilora.layers.weights import fp8_arithmetic as defined

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 160), (2, 1500)])
def test_rounding_rows(rows: int, width: int, group: int | None) -> None:
    x = random(rows, width)
    x[0, :40] = 0.0
    x[-1, -1] = 1e4
    found, expected = fused.quantise(x.to(DEVICE), group), defined.quantise(x, group)
    assert found[0].dtype == expected[0].dtype and found[0].shape == expected[0].shape
    assert torch.equal(found[1].cpu(), expected[1])
    if DEVICE.type == "cuda":
        assert torch.equal(found[0].cpu().float(), expected[0].float())
        return
    q = torch.empty_like(x)  # the interpreter rounds to 8 bits in a way of its own
    fused.quantise_into(q, found[1], x, min(group or width, width))
    assert torch.equal(defined.saturated(q).float(), expected[0].float())


@pytest.mark.parametrize("rows", [1, 17, 70])
@pytest.mark.parametrize(("outs", "width", "block"), [(96, 160, (32, 64)), (160, 200, (128, 128))])
def test_products_in_blocks(rows: int, outs: int, width: int, block: tuple[int, int]) -> None:
    x, x_scale = defined.quantise(random(rows, width), block[1])
    weight = defined.saturated(100 * random(outs, width))
    scale = random(-(-outs // block[0]), -(-width // block[1])).abs()
    expected = defined.blocks_product(x, x_scale, weight, scale, block, torch.float32)
    given = (t.to(DEVICE) for t in (x, x_scale, weight, scale))
    found = fused.blocks_product(*given, block, torch.float32)
    error = (found.cpu() - expected).norm() / expected.norm()
    assert error < (1e-3 if DEVICE.type == "cuda" and rows > fused.FEW_ROWS else 1e-6), (
        "Hopper rounds within 32 columns"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_products_of_scaled_rows() -> None:
    """torch's own, in bf16."""
    x, x_scale = defined.quantise(random(5, 256))
    weight, scale = defined.quantise(random(48, 256))
    expected = defined.rows_product(x, x_scale, weight, scale, torch.float32)
    given = (t.to(DEVICE) for t in (x, x_scale, weight, scale))
    torch.testing.assert_close(
        defined.rows_product(*given, torch.bfloat16).float().cpu(), expected, atol=0.1, rtol=1e-2
    )
