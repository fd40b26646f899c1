"""Packed integers as checkpoints have them and what they mean: written a second time, without the package's code.

Every `from_…` gives what a layer multiplies with and how it rounds its inputs, which stay what they are.
"""

from typing import Any

import numpy as np
import packed_integers
import torch
from quantised import Tensors

GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
GPTQ = {"quant_method": "gptq", "sym": False}


def shuffled(width: int) -> np.ndarray:
    return np.random.default_rng(width).permutation(width)


def gptq(name: str, weight: torch.Tensor) -> Tensors:
    """With groups in any order, and the zero bias that AutoGPTQ writes."""
    ints = packed_integers.rounded(weight, 4, 16, symmetric=False, order=shuffled(weight.shape[1]))
    return packed_integers.pack_gptq(ints, 4) | {"bias": torch.zeros(len(weight))}


def gptq_8(name: str, weight: torch.Tensor) -> Tensors:
    """The newer format, one group."""
    ints = packed_integers.rounded(weight, 8, weight.shape[1], symmetric=True)
    return packed_integers.pack_gptq(ints, 8, older=False)


def awq(name: str, weight: torch.Tensor) -> Tensors:
    return packed_integers.pack_awq(packed_integers.rounded(weight, 4, 32, symmetric=False))


def packed(name: str, weight: torch.Tensor) -> Tensors:
    ints = packed_integers.rounded(weight, 4, 32, symmetric=True)
    return packed_integers.pack_compressed(ints, 4, symmetric=True, in_order=True)


def packed_in_any_order(name: str, weight: torch.Tensor) -> Tensors:
    ints = packed_integers.rounded(weight, 4, 16, symmetric=False, order=shuffled(weight.shape[1]))
    return packed_integers.pack_compressed(ints, 4, symmetric=False, in_order=False)


def bits_of(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Integers out of words along a dimension, for each place in a word."""
    places = [(words.long() >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)]
    return torch.stack(places, dim=dim + 1).flatten(dim, dim + 1)


def from_gptq(held: Tensors, bits: int = 4, older: int = 1) -> Any:
    zeros = (bits_of(held["qzeros"], bits, 1) + older) % (1 << bits)
    group = held["g_idx"].long()
    weight = (bits_of(held["qweight"], bits, 0) - zeros[group]) * held["scales"].float()[group]
    return weight.T, torch.nn.Identity()


def from_awq(held: Tensors) -> Any:
    back = [0, 4, 1, 5, 2, 6, 3, 7]
    numbers, zeros = (
        bits_of(held[name], 4, 1).unflatten(1, (-1, 8))[:, :, back].flatten(1) for name in ("qweight", "qzeros")
    )
    wide = [t.repeat_interleave(32, 0) for t in (zeros, held["scales"].float())]
    return ((numbers - wide[0]) * wide[1]).T, torch.nn.Identity()


def from_packed(held: Tensors) -> Any:
    rows, columns = held["weight_shape"].tolist()
    scales = held["weight_scale"].float()
    group = held.get("weight_g_idx", torch.arange(columns) // (columns // scales.shape[1])).long()
    zeros = torch.full((rows, scales.shape[1]), 8)
    if "weight_zero_point" in held:
        zeros = bits_of(held["weight_zero_point"], 4, 0)[:rows]
    return (bits_of(held["weight_packed"], 4, 1) - zeros[:, group]) * scales[:, group], torch.nn.Identity()
