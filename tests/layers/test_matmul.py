import pytest
import torch
import torch.nn.functional as F

from multilora.layers.matmul import FEW_ROWS, linear


@pytest.mark.parametrize("rows", [1, FEW_ROWS.start, 16, FEW_ROWS.stop - 1, FEW_ROWS.stop])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_linear_function(rows, dtype, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 40, dtype=dtype), torch.randn(24, 40, dtype=dtype)
    b = torch.randn(24, dtype=dtype) if bias else None
    y = linear(x, weight, b)
    assert y.is_contiguous()
    torch.testing.assert_close(y, F.linear(x, weight, b))
