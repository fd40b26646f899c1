"""Weights that a checkpoint holds as packed integers, dequantised while they are loaded: held as plain ones.

What is common to `gptq.py`, `awq.py` and `compressed_tensors.py`: integers of a few bits in words of 32, and a weight
that waits until all tensors of a matrix are there. A model takes the memory that it takes in 16 bit.
"""

from abc import abstractmethod
from collections.abc import Mapping

import torch

from multilora.errors import ModelUnsupported
from multilora.layers.weights.base import FLOATS, Share, Stored, Weight, WeightFormat
from multilora.layers.weights.plain import PlainWeight

WORD = 32
WORDS = ("I32",)
SCALES = FLOATS


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers of so many bits, the lowest of a word first. words: int32 [..., n]. Returns int32
    [..., n · 32 / bits]."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


class UnpackedFormat(WeightFormat):
    """What a matrix of a checkpoint is packed in."""

    @abstractmethod
    def stored(self, out_features: int, in_features: int) -> dict[str, Stored]:
        """See `Weight.tensors`."""

    @abstractmethod
    def dequantised(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """From all of `stored` that are not optional: the matrix, fp32 [out, in]."""

    def check_spare(self, name: str, tensor: torch.Tensor) -> None:
        """Raise ModelUnsupported if an optional tensor says something that would be lost."""

    def make(self, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype) -> Weight:
        return UnpackedWeight(self, out_features, in_features, device=device, dtype=dtype)


class UnpackedWeight(PlainWeight):
    """W as a tensor of the model's dtype, which is filled a matrix at a time."""

    def __init__(
        self, kind: UnpackedFormat, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype
    ):
        super().__init__(out_features, in_features, device=device, dtype=dtype)
        self._kind = kind
        self._waiting: dict[int, dict[str, torch.Tensor]] = {}  # by the first row of their matrix

    def tensors(self, rows: slice, share: Share) -> dict[str, Stored]:  # noqa: ARG002 - the contract's
        assert share.is_whole, "ranks are refused"
        return self._kind.stored(share.out_features, share.in_features)

    def load(self, rows: slice, name: str, tensor: torch.Tensor) -> None:
        height = len(range(*rows.indices(len(self.data))))
        stored = self._kind.stored(height, self.data.shape[1])
        if stored[name].optional:
            self._kind.check_spare(name, tensor)
            return
        waiting = self._waiting.setdefault(rows.start or 0, {})
        waiting[name] = tensor.to(self.data.device)
        if waiting.keys() == {name for name, s in stored.items() if not s.optional}:
            self.data[rows].copy_(self._kind.dequantised(self._waiting.pop(rows.start or 0)))


def check_divides(what: str, size: int, by: int) -> None:
    """Raise ModelUnsupported unless so many rows or columns are whole words or groups."""
    if size % by:
        raise ModelUnsupported(f"{what} of {size}: expected a multiple of {by}")
