import pytest
import torch
import torch.nn.functional as F

from multilora.layers.matmul import FEW_ROWS, TURNED_ROWS, linear


def check(rows: int, dtype: torch.dtype, bias: bool, inputs: int = 40, outputs: int = 24) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
    b = torch.randn(outputs, dtype=dtype) if bias else None
    y = linear(x, weight, b)
    assert y.is_contiguous()
    torch.testing.assert_close(y, F.linear(x, weight, b), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "rows", [0, 1, 5, 8, FEW_ROWS.stop - 1, FEW_ROWS.stop, TURNED_ROWS.stop - 1, TURNED_ROWS.stop]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_linear_function(rows: int, dtype: torch.dtype, bias: bool) -> None:
    check(rows, dtype, bias)


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_without_a_compiler(rows: int, torch_operations: None) -> None:
    check(rows, torch.float32, bias=True)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (15, 5), (17, 13), (768, 600), (2049, 7)])
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 16])
def test_few_rows_of_any_size(rows: int, inputs: int, outputs: int) -> None:
    """Ends of rows, of blocks of outputs and of blocks of rows; the last sizes are worth threads."""
    check(rows, torch.float32, bias=True, inputs=inputs, outputs=outputs)


def test_a_weight_that_is_a_view_of_another_order() -> None:
    x, weight = torch.randn(4, 40), torch.randn(40, 24).T
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
