"""The contract of a weight: a matrix that may be stored in another form than it has in the arithmetic.

The tensors of a weight are allocated once and filled in place, so that CUDA graphs captured over them stay valid.
A format says how many of a checkpoint's tensors a matrix has and what they are called; reading them is `models/`'.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from multilora.batch import ExpertRows

FLOATS = ("F64", "F32", "BF16", "F16")
"""What safetensors calls the dtypes of weights that are not quantised."""


@dataclass(frozen=True)
class Share:
    """What a rank holds of a checkpoint's matrix [out_features, in_features]: its part of both."""

    out_features: int
    in_features: int
    outputs: range
    inputs: range

    @classmethod
    def whole(cls, out_features: int, in_features: int) -> "Share":
        """All of the matrix."""
        return cls(out_features, in_features, range(out_features), range(in_features))

    @property
    def is_whole(self) -> bool:
        return len(self.outputs) == self.out_features and len(self.inputs) == self.in_features


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint that a matrix is read from.

    shape: of all of it; None: any. dtypes: as safetensors names them. part: the ranges of its dimensions that this
    rank reads; empty: all of it. optional: a checkpoint may lack it.
    """

    shape: tuple[int, ...] | None
    dtypes: tuple[str, ...] = FLOATS
    part: tuple[range, ...] = ()
    optional: bool = False


class Weight(nn.Module, ABC):
    """A matrix W [out, in]. What it is stored in are parameters of the module, which is how a model's bytes are
    counted."""

    @abstractmethod
    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x: [rows, in], bias: [out]. Returns x Wᵀ + bias, [rows, out], contiguous, in the dtype of x."""

    @abstractmethod
    def dequantised(self, rows: slice) -> torch.Tensor:
        """These rows of W in a floating-point dtype, [rows, in]; may share memory with the weight, so read-only."""

    @abstractmethod
    def tensors(self, rows: slice, share: Share) -> dict[str, Stored]:
        """Which tensors of a checkpoint fill these rows of W, by their names in the module of their matrix.

        Raises ConfigError for a share that the format cannot have.
        """

    @abstractmethod
    def load(self, rows: slice, name: str, tensor: torch.Tensor) -> None:
        """Fill these rows of W from one of `tensors`, or keep it until the others are there.

        Raises ModelUnsupported for values that the format does not allow.
        """

    @abstractmethod
    def randomise(self, generator: torch.Generator) -> None:
        """Fill W with small noise."""

    def drop(self) -> None:
        """Free what is derived from W, which is undefined afterwards: it will be filled anew."""

    def check_filled(self) -> None:
        """Raise ModelUnsupported if what has been loaded is not enough to multiply with."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic, which x has too."""


class ExpertsWeight(Weight):
    """The matrices of `experts` experts of a mixture, [height, width] each, below each other in one W.

    Ranks divide experts, not their matrices.
    """

    experts: int
    height: int
    width: int

    @abstractmethod
    def grouped_matmul(self, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        """x: [rows, in], in the order of `rows`. Returns the product of each row and the matrix of its expert,
        [rows, height], in the dtype of x; what belongs to no expert is of no use."""

    @property
    @abstractmethod
    def capturable(self) -> bool:
        """Whether CUDA graphs can hold `grouped_matmul`: it never waits for the device."""

    def rows_of(self, expert: int) -> slice:
        """The rows of W that are the matrix of an expert."""
        return slice(expert * self.height, (expert + 1) * self.height)


class WeightFormat(ABC):
    """How matrices are held: makes weights."""

    shards: bool = False
    """Whether a rank can hold a part of a matrix."""

    def of_ranks(self) -> "WeightFormat":
        """The format of a rank's part of a matrix in this one. Only where it `shards`."""
        return self

    @property
    def unshared_inputs(self) -> str | None:
        """What keeps a rank that can hold some outputs of a matrix from holding some inputs; None: nothing does."""
        return None

    @property
    @abstractmethod
    def name(self) -> str:
        """As logs say it: "fp8 in blocks of 128 x 128"."""

    @abstractmethod
    def make(self, out_features: int, in_features: int, *, device: torch.device, dtype: torch.dtype) -> Weight:
        """A weight of this shape, its memory undefined. dtype: of the arithmetic.

        Raises ModelUnsupported if the format has no such shape, ConfigError if the device cannot multiply with it.
        """

    def merges(self, widths: Sequence[int]) -> bool:  # noqa: ARG002 - the contract's
        """Whether matrices with so many outputs each can lie in one weight, below each other."""
        return True


class ExpertsFormat(WeightFormat):
    """A format that the experts of a mixture can have, too."""

    @abstractmethod
    def make_experts(
        self, experts: int, parts: Sequence[int], in_features: int, *, device: torch.device, dtype: torch.dtype
    ) -> ExpertsWeight:
        """A weight for so many experts, its memory undefined. parts: how many outputs each of the matrices has that
        lie below each other in the one of an expert: gate and up, or down alone.

        Raises ModelUnsupported for sizes, and for scales of what is multiplied, that experts cannot have.
        """
