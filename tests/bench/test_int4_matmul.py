"""The benchmark of 4-bit products says from how many rows on dequantising first is faster."""

import pytest

from bench import int4_matmul


def shape(packed: float, dequantised: float) -> dict[int, dict[str, float]]:
    return {rows: {"packed": packed * rows, "dequantised": dequantised + rows} for rows in int4_matmul.ROWS}


@pytest.mark.parametrize(("packed", "dequantised", "rows"), [(2, 40, 32), (2, 0.5, 0), (1, 1, 512)])
def test_the_switch(packed: float, dequantised: float, rows: int) -> None:
    assert int4_matmul.switch([shape(packed, dequantised), shape(packed, dequantised)]) == rows
