"""What one rank of a tensor-parallel group holds of a site, of the weights of its slices and of their LoRA.

The local site of every rank looks the same, so adapters have one layout, the same page numbers and slots on all
ranks; `inputs_of`, `outputs_of` and `experts_of` say which columns and experts of the whole module those are. Every
cut is exact: a module that is cut by outputs computes its own columns; one that is cut by inputs or by experts
computes a share, whose sum over the ranks is the whole. Experts are divided among the ranks as wholes, or each of
them is cut by outputs or inputs as any other module is.
"""

from dataclasses import replace
from functools import lru_cache

from multilora.distributed.partition import block_parts, even_part, padded_part, padded_size, unit_part
from multilora.errors import ConfigError
from multilora.lora.sites import EMBED, LoraSite, LoraSlice, Shard

Sites = tuple[LoraSite, ...]


@lru_cache(maxsize=16)
def local_sites(sites: Sites, size: int) -> Sites:
    """The sites as each of `size` ranks computes them. Raises ConfigError naming the module that does not divide."""
    return sites if size == 1 else tuple(local_site(site, size) for site in sites)


def local_site(site: LoraSite, size: int) -> LoraSite:
    """One of `local_sites`."""
    if size == 1:
        return site
    try:
        in_features = _padded_inputs(site, size)
        slices, offset = [], 0
        for part in site.slices:
            width = _padded_outputs(site, part, size)
            slices.append(replace(part, offset=offset, out_features=width))
            offset += width
        experts = len(experts_of(site, 0, size))
    except ValueError as e:
        names = ", ".join(part.module for part in site.slices)
        raise ConfigError(f"--tp-size {size}: {names}: {e}") from None
    return replace(site, in_features=in_features, slices=tuple(slices), experts=experts)


def sums_over_ranks(site: LoraSite) -> bool:
    """Whether each rank computes a share of all outputs, from its own inputs, and the shares are summed."""
    return site.slices[0].shard in (Shard.ROW, Shard.EXPERT) or site.name == EMBED


def inputs_of(site: LoraSite, rank: int, size: int) -> range:
    """The inputs of the whole site that the rank reads. An embedding's are token ids, and the last may be none."""
    if site.name == EMBED:
        return padded_part(site.in_features, rank, size)
    if site.slices[0].shard is Shard.ROW:
        return even_part(site.in_features, rank, size)
    return range(site.in_features)


def output_blocks_of(site: LoraSite, part: LoraSlice, rank: int, size: int) -> tuple[range, ...]:
    """The outputs of the whole slice `part` of the whole site that the rank computes, in their order there: one range
    in each of the slice's blocks where it is cut by them, as only experts are."""
    if part.shard is Shard.COLUMN and site.experts:
        return block_parts(part.out_features, part.blocks, part.unit, rank, size)
    return (outputs_of(site, part, rank, size),)


def outputs_of(site: LoraSite, part: LoraSlice, rank: int, size: int) -> range:
    """The same of a slice of one block. A head's are token ids."""
    assert part.blocks == 1 or part.shard is not Shard.COLUMN, "several ranges, which `output_blocks_of` knows"
    match part.shard:
        case Shard.COLUMN:
            return unit_part(part.out_features, part.unit, rank, size)
        case Shard.KV:
            return unit_part(part.out_features, part.unit, rank, size, replicate=True)
        case Shard.VOCAB if site.name != EMBED:
            return padded_part(part.out_features, rank, size)
    return range(part.out_features)


def experts_of(site: LoraSite, rank: int, size: int) -> range:
    """The experts of the whole site that the rank holds; none, if it is no site of experts. Raises ValueError if the
    ranks cannot have equally many."""
    if site.slices[0].shard is not Shard.EXPERT:
        return range(site.experts)
    if site.experts % size:
        raise ValueError(f"{site.experts} experts cannot be divided into {size} equal parts")
    return even_part(site.experts, rank, size)


def _padded_inputs(site: LoraSite, size: int) -> int:
    return padded_size(site.in_features, size) if site.name == EMBED else len(inputs_of(site, 0, size))


def _padded_outputs(site: LoraSite, part: LoraSlice, size: int) -> int:
    if part.shard is Shard.VOCAB and site.name != EMBED:
        return padded_size(part.out_features, size)
    return sum(map(len, output_blocks_of(site, part, 0, size)))
