"""What each rank of a tensor-parallel group needs of an adapter's blocks, as the cuts of their modules ask for it.

    the module is cut by     lora_A             lora_B             magnitude   biases     full weight
    outputs                  whole              columns            columns     columns    rows
    inputs                   columns            whole              whole       rank 0's   columns
    experts                  its experts'       its experts', and whole where all experts share it

Experts that are cut by outputs or inputs, each of them, have these columns of every expert's lora_A and lora_B. The
columns of outputs may be several ranges, such as a part of gate and the same part of up.

Where a module is cut by inputs, the ranks' outputs are summed: scale · (y₀ + y₁ + …) + shift is
(scale · y₀ + shift) + scale · y₁ + …, so only rank 0 has a shift. Norms, and what replaces a table or rows of it, are
whole on every rank. Called by `loading/loader.py`.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F

from multilora.adapters.adapter import Adapter, Block, Full, LowRank, Rows, Vector, VectorKind
from multilora.lora.sharding import experts_of, inputs_of, local_site, output_blocks_of, sums_over_ranks
from multilora.lora.sites import TABLES, LoraSite, Shard

Sites = tuple[LoraSite, ...]


@dataclass(frozen=True)
class _Place:
    """Where a module lies. inputs, outputs: what each rank holds of it, as ranges behind each other; in_features,
    width: those of every rank's own module, in columns of A and of B."""

    site: LoraSite
    inputs: tuple[tuple[range, ...], ...]
    outputs: tuple[tuple[range, ...], ...]
    in_features: int
    width: int


Places = dict[tuple[int, str], _Place]


def cut(adapter: Adapter, sites: Sites, rank: int, size: int) -> Adapter:
    """The adapter as rank number `rank` of `size` has it. sites: of the whole model."""
    if size == 1:
        return adapter
    places = _places(sites, size)
    return replace(adapter, blocks=tuple(_cut(block, places, rank, size) for block in adapter.blocks))


@lru_cache(maxsize=16)
def _places(sites: Sites, size: int) -> Places:
    """By layer and module: of one model, asked for by every adapter."""
    found: Places = {}
    for site in sites:
        local = local_site(site, size)
        for part, own in zip(site.slices, local.slices, strict=True):
            inputs = tuple((inputs_of(site, rank, size),) for rank in range(size))
            outputs = tuple(output_blocks_of(site, part, rank, size) for rank in range(size))
            found[site.layer, part.module] = _Place(site, inputs, outputs, local.in_features, own.out_features)
    return found


def _cut(block: Block, places: Places, rank: int, size: int) -> Block:
    place = None if isinstance(block, Rows) else places.get((block.layer, block.module))
    if place is None:
        return block
    site, inputs, outputs = place.site, place.inputs[rank], place.outputs[rank]
    match block:
        case LowRank(a=a, b=b) if site.slices[0].shard is Shard.EXPERT:
            held = experts_of(site, rank, size)
            a, b = (x if len(x) == 1 else x[held.start : held.stop] for x in (a, b))
            return replace(block, a=a, b=b)
        case LowRank(a=a, b=b):
            return replace(block, a=_columns(a, inputs, place.in_features), b=_columns(b, outputs, place.width))
        case Vector(value=value):
            if sums_over_ranks(site) and rank and block.kind is not VectorKind.MAGNITUDE:
                return replace(block, value=torch.zeros_like(value))
            return replace(block, value=_columns(value, outputs, place.width))
        case Full(weight=weight) if block.module not in TABLES:
            return replace(block, weight=_held(_held(weight, outputs, 0), inputs, -1))
    return block


def _held(x: torch.Tensor, ranges: tuple[range, ...], dim: int) -> torch.Tensor:
    """These ranges of a dimension of x, behind each other; a view, if it is one."""
    found = [x.narrow(dim, held.start, len(held)) for held in ranges]
    return found[0] if len(found) == 1 else torch.cat(found, dim)


def _columns(x: torch.Tensor, ranges: tuple[range, ...], width: int) -> torch.Tensor:
    """These columns of x, its last dimension, and zeros behind them up to `width`."""
    x = _held(x, ranges, -1)
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
