"""Parameters of a tree that ranks divide and that belong to no linear layer: experts', and those of attention heads.

A parameter is cut along one dimension. Where several blocks of columns lie behind each other in it, as gate and up
do, every rank holds the same part of each. `lora/sharding.py` cuts adapters on experts by the same blocks and units.
Called by `division.py`, `experts.py`, `model.py` and `weights.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from multilora.distributed.group import Group
from multilora.distributed.partition import block_parts
from multilora.errors import ConfigError
from multilora.models.weights import Part


@dataclass(frozen=True)
class ParameterCut:
    """How a parameter is divided.

    dim: along which dimension, counted from the last one, -1. blocks: how many blocks of the same width lie behind
    each other there. unit: so many numbers of a block belong together.
    """

    dim: int
    blocks: int = 1
    unit: int = 1

    def part(self, shape: tuple[int, ...], rank: int, size: int) -> Part:
        """What the rank holds of a parameter of this shape. Raises ValueError if the parts cannot be equal."""
        ranges = block_parts(shape[self.dim], self.blocks, self.unit, rank, size)
        whole: list[range | tuple[range, ...]] = [range(count) for count in shape]
        whole[self.dim] = ranges if self.blocks > 1 else ranges[0]
        return tuple(whole)

    def held_shape(self, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        """The shape of each rank's part."""
        held = list(shape)
        held[self.dim] //= size
        return tuple(held)


@dataclass(frozen=True)
class HeldParameter:
    """The shape of a whole tensor, and which part of it this rank holds."""

    shape: tuple[int, ...]
    part: Part


def cut_parameters(lm: nn.Module, cuts: Mapping[str, ParameterCut], group: Group) -> dict[str, HeldParameter]:
    """Replace parameters, on the meta device, by this rank's parts of them.

    cuts: by the path of a parameter. Returns what is held of each, by the same paths. Raises ConfigError naming the
    parameter that does not divide.
    """
    found = {}
    for path, cut in cuts.items() if group.size > 1 else ():
        owner, _, name = path.rpartition(".")
        module = lm.get_submodule(owner)
        whole = module.get_parameter(name)
        shape = tuple(whole.shape)
        try:
            found[path] = HeldParameter(shape, cut.part(shape, group.rank, group.size))
        except ValueError as e:
            raise ConfigError(f"--tp-size {group.size}: {path}: its width {e}") from None
        held = torch.empty(cut.held_shape(shape, group.size), dtype=whole.dtype, device="meta")
        setattr(module, name, nn.Parameter(held, requires_grad=False))
    return found
