"""KV caches of 8-bit floats: their names, and how keys and values are stored in them.

What is stored is x / scale, rounded; attention multiplies scores by the keys' scale and sums by the values'. Scales
are a model's, by layer; 1 where it has none. `--kv-cache-dtype` finds its choices here, so this file imports no heavy
library.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KV_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""The names of torch dtypes, by those that users give."""

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def largest(dtype: "torch.dtype") -> float | None:
    """The largest number of a dtype of 8 bits, which what is larger becomes; None: it is none of these."""
    return LARGEST.get(str(dtype).removeprefix("torch."))


def as_stored(x: "torch.Tensor", dtype: "torch.dtype", scale: float) -> "torch.Tensor":
    """x as pages of `dtype` hold it."""
    most = largest(dtype)
    return x.to(dtype) if most is None else (x.float() / scale).clamp_(-most, most).to(dtype)


def in_bytes(pages: "torch.Tensor") -> "torch.Tensor":
    """The same memory in a dtype that torch can index: 8-bit floats as integers."""
    import torch

    return pages if largest(pages.dtype) is None else pages.view(torch.uint8)
