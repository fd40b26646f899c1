"""Keys and values in 8 bit."""

import pytest
import torch

from multilora.attention.kv_dtypes import KV_DTYPES, LARGEST, as_stored, in_bytes, largest


@pytest.mark.parametrize("name", KV_DTYPES)
def test_the_largest_number(name: str) -> None:
    dtype = getattr(torch, KV_DTYPES[name])
    assert largest(dtype) == LARGEST[KV_DTYPES[name]] == torch.finfo(dtype).max
    stored = as_stored(torch.tensor([1e9, -1e9, 3.0, 0.0]), dtype, 2.0)
    assert stored.dtype == dtype
    assert stored.float().tolist() == [largest(dtype), -largest(dtype), 1.5, 0.0]
    assert in_bytes(stored).dtype == torch.uint8


def test_other_dtypes_are_left_alone() -> None:
    x = torch.randn(4)
    assert largest(torch.float16) is None
    assert torch.equal(as_stored(x, torch.float16, 1.0), x.half())
    assert in_bytes(x) is x
