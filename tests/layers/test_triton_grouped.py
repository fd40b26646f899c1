"""The grouped product of a few rows against a loop over experts: in Triton's interpreter, and on a GPU if there is
one."""

import pytest
import torch

pytest.importorskip("triton")

from multilora.layers import triton_grouped as fused

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter's bf16 products are wrong
BLOCKS = {
    "as chosen": fused.BLOCKS,
    "rows first": fused.GroupedBlocks(16, 32, 64, swapped=False),
    "tall": fused.GroupedBlocks(64, 64, 64, swapped=False),
}


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("outs", "width"), [(64, 128), (96, 200)])
def test_every_row_meets_its_expert(outs: int, width: int, blocks: str) -> None:
    """Experts with none, one, a few, and more rows than a block; the last rows are nobody's."""
    counts = [0, 1, 5, 0, 37, 2]
    ends = torch.tensor(counts).cumsum(0).int()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts) + 3, width, generator=g).to(DTYPE)
    weight = torch.randn(len(counts), outs, width, generator=g).to(DTYPE)
    found = fused.grouped_product(x.to(DEVICE), weight.to(DEVICE), ends.to(DEVICE), BLOCKS[blocks]).cpu()
    start = 0
    for expert, end in enumerate(ends.tolist()):
        expected = x[start:end].float() @ weight[expert].float().T
        torch.testing.assert_close(found[start:end].float(), expected, atol=width**0.5 / 50, rtol=1e-2)
        start = end
