"""The kernel that dequantises 4-bit tiles against its definition, in Triton's interpreter or on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from multilora.layers import triton_int4 as fused
from multilora.layers.weights import int4_arithmetic as defined

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("outs", "width", "group"), [(8, 32, 32), (24, 192, 64), (16, 256, 128)])
def test_tiles_come_out_as_defined(outs: int, width: int, group: int) -> None:
    g = torch.Generator().manual_seed(width)
    shape = defined.packed_like(outs, width, torch.device("meta")).shape
    packed = torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64, generator=g).int().to(DEVICE)
    scales = torch.randn(width // group, outs, 2, generator=g).to(DEVICE)
    found, expected = (torch.full((outs, width), torch.nan, device=DEVICE) for _ in range(2))
    fused.dequantise_into(found, packed, group, scales)
    defined.dequantise_into(expected, packed, group, scales)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
