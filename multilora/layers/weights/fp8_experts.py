"""The experts of a mixture in FP8: their matrices below each other, held and filled as one of `fp8.py` is.

Every row is rounded and multiplied as there, with the matrix of its expert. Called by `fp8.py`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from multilora.batch import ExpertRows
from multilora.errors import ModelUnsupported
from multilora.layers.weights.base import ExpertsWeight
from multilora.layers.weights.fp8 import Activations, Fp8Blocks, Fp8BlocksWeight, Fp8Rows, Fp8RowsWeight
from multilora.layers.weights.fp8_arithmetic import grouped_obstacle, grouped_product, quantise


class _Fp8Experts(ExpertsWeight):
    """What both forms have in common. _block: rows and columns that share a scale; None: each row has one."""

    data: nn.Parameter
    scale: nn.Parameter
    _block: tuple[int, int] | None = None

    def grouped_matmul(self, x: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        q, scale = quantise(x, self._block and self._block[1])
        data, scales = (t.unflatten(0, (self.experts, -1)) for t in (self.data, self.scale))
        return grouped_product(q, scale, data, scales, rows.ends, self._block, x.dtype)

    @property
    def capturable(self) -> bool:
        return grouped_obstacle(self.data.device, self._block) is None

    def _pieces(self) -> Iterable[slice]:
        return map(self.rows_of, range(self.experts))


class Fp8RowsExperts(_Fp8Experts, Fp8RowsWeight):
    """A scale for each row of each expert; see `Fp8Rows`. parts: see `ExpertsFormat.make_experts`."""

    def __init__(
        self,
        kind: Fp8Rows,
        experts: int,
        parts: Sequence[int],
        in_features: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ):
        _check_rounding(kind)
        super().__init__(kind, experts * sum(parts), in_features, device=device, dtype=dtype)
        self.experts, self.height, self.width = experts, sum(parts), in_features


class Fp8BlocksExperts(_Fp8Experts, Fp8BlocksWeight):
    """A scale for each block of each expert; see `Fp8Blocks`. parts: see `ExpertsFormat.make_experts`."""

    def __init__(
        self,
        kind: Fp8Blocks,
        experts: int,
        parts: Sequence[int],
        in_features: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ):
        _check_rounding(kind)
        high = kind.block[0]
        if any(outs % high for outs in parts):
            found = " and ".join(map(str, parts))
            raise ModelUnsupported(
                f"experts of {found} outputs in {kind.name} are not supported; of a multiple of {high} they are"
            )
        super().__init__(kind, experts * sum(parts), in_features, device=device, dtype=dtype)
        self.experts, self.height, self.width = experts, sum(parts), in_features
        self._block = kind.block


def _check_rounding(kind: Fp8Rows | Fp8Blocks) -> None:
    """Raise ModelUnsupported for scales of what is multiplied that experts cannot have."""
    if kind.activations is not Activations.DYNAMIC:
        raise ModelUnsupported(
            f"experts in {kind.name} are not supported; with activations {Activations.DYNAMIC} they are"
        )
