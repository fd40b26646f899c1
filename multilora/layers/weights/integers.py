"""Weights that a checkpoint holds as integers of a few bits in words of 32, with a scale and a zero point for groups.

What is common to `gptq.py`, `awq.py` and `compressed_tensors.py`: what a matrix is made of, whatever its layout, and
the wait until all tensors of a matrix are there.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from multilora.errors import ConfigError, ModelUnsupported
from multilora.kernels.integers import cdiv
from multilora.layers.weights.base import FLOATS, Share, Stored

WORD = 32
WORDS = ("I32",)
SCALES = FLOATS


@dataclass(frozen=True)
class GroupedIntegers:
    """W[o, i] = (numbers[o, i] - zeros[o, g]) · scales[o, g], where g = group[i].

    numbers: int32 [out, in]; zeros: int32 [out, groups]; scales: fp32 [out, groups]; group: int64 [in].
    """

    numbers: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    group: torch.Tensor

    def check_neighbours(self, size: int) -> None:
        """Raise ModelUnsupported unless groups are of `size` inputs beside each other, one after the other."""
        if not torch.equal(self.group, torch.arange(len(self.group), device=self.group.device) // size):
            raise ModelUnsupported("g_idx: groups of different sizes, or in another order than desc_act says")

    def dequantised(self) -> torch.Tensor:
        """W, fp32 [out, in]."""
        return (self.numbers - self.zeros[:, self.group]).float() * self.scales[:, self.group]


class IntegerLayout(ABC):
    """How a checkpoint holds a matrix of integers. group: inputs that share a scale; None: all do.

    A share of a matrix is, with the groups of its inputs, a matrix of the same layout.
    """

    bits: int
    group: int | None

    @property
    def any_order(self) -> bool:
        """Whether the inputs of a group need not be neighbours."""
        return False

    @abstractmethod
    def stored(self, share: Share) -> dict[str, Stored]:
        """See `Weight.tensors`."""

    @abstractmethod
    def integers(self, tensors: Mapping[str, torch.Tensor], share: Share) -> GroupedIntegers:
        """From what a share has of all of `stored` that are not optional. Raises ModelUnsupported."""

    def count(self, in_features: int) -> int:
        """How many groups so many inputs have."""
        return cdiv(in_features, self.group or in_features)

    def groups(self, share: Share) -> range:
        """The groups that its inputs belong to: some that are beside each other where those of a group are, else
        all."""
        if self.any_order:
            return range(self.count(share.in_features))
        size = self.group or share.in_features
        return range(share.inputs.start // size, cdiv(share.inputs.stop, size))

    def group_of_inputs(self, share: Share, device: torch.device) -> torch.Tensor:
        """Each input's group, its number among `groups`, int64 [in], where those of a group are beside each other."""
        size = self.group or share.in_features
        inputs = torch.arange(share.inputs.start, share.inputs.stop, device=device)
        return inputs // size - self.groups(share).start

    def check_spare(self, name: str, tensor: torch.Tensor) -> None:
        """Raise ModelUnsupported if an optional tensor says something that would be lost."""
        raise ModelUnsupported(f"{name} {list(tensor.shape)} is not supported")


class IncompleteMatrices:
    """The tensors of matrices that have not come in full. width: inputs of each."""

    def __init__(self, layout: IntegerLayout, width: int):
        self._layout, self._width = layout, width
        self._shares: dict[int, Share] = {}  # by the first row of their matrix, as the next
        self._waiting: dict[int, dict[str, torch.Tensor]] = {}

    def expect(self, start: int, share: Share) -> dict[str, Stored]:
        """What is read of the matrix whose rows begin at `start`: this share."""
        self._shares[start] = share
        return self._layout.stored(share)

    def add(
        self, start: int, height: int, name: str, tensor: torch.Tensor, device: torch.device
    ) -> GroupedIntegers | None:
        """One tensor of the matrix in rows [start, start + height), or of the share that is expected there. Returns
        the matrix with its last tensor."""
        share = self._shares.get(start) or Share.whole(height, self._width)
        stored = self._layout.stored(share)
        if stored[name].optional:
            self._layout.check_spare(name, tensor)
            return None
        waiting = self._waiting.setdefault(start, {})
        waiting[name] = tensor.to(device)
        if waiting.keys() != {name for name, s in stored.items() if not s.optional}:
            return None
        return self._layout.integers(self._waiting.pop(start), share)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers of so many bits, the lowest of a word first. words: int32 [..., n]. Returns int32
    [..., n · 32 / bits]."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def part_of(share: Share, *held: range) -> tuple[range, ...]:
    """What of a tensor is read, by dimension, as `Stored` has it."""
    return () if share.is_whole else held


def words_of(what: str, held: range, per_word: int, size: int) -> range:
    """The words that hold these of `size` rows or columns, the last of which need not be full. Raises ConfigError for
    parts of words."""
    if held.start % per_word or (held.stop % per_word and held.stop != size):
        raise ConfigError(f"{what} {held.start} to {held.stop} of a rank are not whole words of {per_word}")
    return range(held.start // per_word, cdiv(held.stop, per_word))


def check_divides(what: str, size: int, by: int) -> None:
    """Raise ModelUnsupported unless so many rows or columns are whole words or groups."""
    if size % by:
        raise ModelUnsupported(f"{what} of {size}: expected a multiple of {by}")
