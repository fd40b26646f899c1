"""Cut blocks: what the ranks compute from theirs, put together as their modules' outputs are, is what one would."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from multilora.adapters.adapter import MODEL_LEVEL, Adapter, Full, LowRank, Rows, Vector, VectorKind
from multilora.adapters.packing.blocks import Blocks, PackTarget, pack
from multilora.adapters.packing.cut import cut
from multilora.lora.sharding import inputs_of, local_sites, output_blocks_of, outputs_of, sums_over_ranks
from multilora.lora.sites import EMBED, HEAD, LoraSite, LoraSlice, Shard

HEAD_DIM = 16
SITES = (
    LoraSite(
        0,
        0,
        "qkv_proj",
        48,
        (
            LoraSlice("q_proj", 0, 64, shard=Shard.COLUMN, unit=HEAD_DIM),
            LoraSlice("k_proj", 64, 32, shard=Shard.KV, unit=HEAD_DIM),
        ),
    ),
    LoraSite(1, 0, "down_proj", 96, (LoraSlice("down_proj", 0, 48, shard=Shard.ROW),)),
    LoraSite(2, MODEL_LEVEL, EMBED, 101, (LoraSlice(EMBED, 0, 48, shard=Shard.VOCAB),)),
    LoraSite(3, MODEL_LEVEL, HEAD, 48, (LoraSlice(HEAD, 0, 101, shard=Shard.VOCAB),)),
)
MODULES = {part.module: (site, part) for site in SITES for part in site.slices}
SIZES = [1, 2, 4]


def low_rank(module: str, rank: int = 3) -> LowRank:
    site, part = MODULES[module]
    g = torch.Generator().manual_seed(len(module))
    a = torch.randn(rank, site.in_features, generator=g, dtype=torch.float64)
    return LowRank(site.layer, module, a, torch.randn(rank, part.out_features, generator=g, dtype=torch.float64), 0.5)


def cuts(block: LowRank | Vector | Full | Rows, size: int) -> list:
    adapters = [cut(Adapter((block,), "f"), SITES, rank, size) for rank in range(size)]
    return [adapter.blocks[0] for adapter in adapters]


def together(module: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The ranks' outputs [rows, local out] as the layers put them together: [rows, out]."""
    site, part = MODULES[module]
    if sums_over_ranks(site):
        return torch.stack(parts).sum(0)
    y = torch.empty(len(parts[0]), part.out_features, dtype=parts[0].dtype)
    for rank, own in enumerate(parts):
        held = outputs_of(site, part, rank, len(parts))
        y[:, held.start : held.stop] = own[:, : len(held)]
    return y


def own_inputs(module: str, x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    site = MODULES[module][0]
    held = inputs_of(site, rank, size)
    width = local_sites(SITES, size)[site.index].in_features
    return torch.nn.functional.pad(x[:, held.start : held.stop], (0, width - len(held)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("module", MODULES)
def test_low_rank(module: str, size: int) -> None:
    block = low_rank(module)
    x = torch.randn(5, MODULES[module][0].in_features, dtype=torch.float64)
    parts = [
        own_inputs(module, x, rank, size) @ own.a.T @ own.b * own.scaling
        for rank, own in enumerate(cuts(block, size))
    ]
    torch.testing.assert_close(together(module, parts), 0.5 * (x @ block.a.T @ block.b))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("module", [m for m in MODULES if m != EMBED])
def test_scale_and_shift(module: str, size: int) -> None:
    """scale · y + shift of every rank, where y is its own output or its share of the sum."""
    site, part = MODULES[module]
    scale, shift = torch.rand(2, part.out_features, dtype=torch.float64)
    y = torch.randn(5, part.out_features, dtype=torch.float64)
    width = local_sites(SITES, size)[site.index].slices[site.slices.index(part)].out_features
    parts = []
    for rank in range(size):
        held = outputs_of(site, part, rank, size)
        own = y / size if sums_over_ranks(site) else y[:, held.start : held.stop]
        own = torch.nn.functional.pad(own, (0, width - own.shape[1]))
        kinds = ((VectorKind.MAGNITUDE, scale), (VectorKind.LORA_BIAS, shift))
        blocks = [cuts(Vector(site.layer, module, kind, value), size)[rank] for kind, value in kinds]
        parts.append(blocks[0].value * own + blocks[1].value)
    torch.testing.assert_close(together(module, parts), scale * y + shift)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("module", ["q_proj", "k_proj", "down_proj"])
def test_full_weights(module: str, size: int) -> None:
    site, part = MODULES[module]
    weight = torch.randn(part.out_features, site.in_features, dtype=torch.float64)
    x = torch.randn(5, site.in_features, dtype=torch.float64)
    owns = cuts(Full(site.layer, module, weight), size)
    parts = [own_inputs(module, x, rank, size) @ own.weight.T for rank, own in enumerate(owns)]
    torch.testing.assert_close(together(module, parts), x @ weight.T)


def test_norms_tables_and_rows_are_whole_everywhere() -> None:
    for block in (
        Full(0, "input_layernorm", torch.ones(48)),
        Full(MODEL_LEVEL, HEAD, torch.ones(105, 48)),
        Rows(EMBED, (3, 100), torch.ones(2, 48)),
    ):
        assert all(own is block for own in cuts(block, 2))


@pytest.mark.parametrize("size", SIZES)
def test_the_pages_of_each_rank_are_those_of_its_cut(size: int) -> None:
    """Packed at once for all ranks: one after the other, of one layout."""
    blocks = tuple(replace(b, a=b.a.float(), b=b.b.float()) for b in (low_rank(m, 9) for m in MODULES))
    adapter = Adapter((*blocks, Full(0, "down_proj", torch.randn(48, 96))), "f")
    target = PackTarget.of(SITES, torch.float32, 4096, size)
    ranks = [Blocks.of(cut(adapter, SITES, rank, size)) for rank in range(size)]
    (shape,) = {own.shape(target.sites) for own in ranks}
    layout = target.layout(shape)
    out = torch.zeros(size * layout.num_pages, 4096, dtype=torch.uint8)
    pack(ranks, target, layout, out)
    for own, pages in zip(ranks, out.split(layout.num_pages), strict=True):
        alone = torch.zeros_like(pages)
        pack([own], target, layout, alone)
        assert torch.equal(pages, alone) and alone.any()


EXPERTS, INNER, HIDDEN = 3, 8, 24


def experts_site(module: str, **cut: Any) -> LoraSite:
    width, outs = (HIDDEN, 2 * INNER) if module == "gate_up_proj" else (INNER, HIDDEN)
    return LoraSite(0, 0, module, width, (LoraSlice(module, 0, outs, **cut),), experts=EXPERTS)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "site",
    [
        experts_site("gate_up_proj", shard=Shard.COLUMN, blocks=2),
        experts_site("gate_up_proj", shard=Shard.COLUMN, unit=2),
        experts_site("down_proj", shard=Shard.ROW),
    ],
    ids=["gate, then up", "gate and up in turns", "down"],
)
def test_low_rank_of_each_expert(site: LoraSite, size: int, shared: bool) -> None:
    """shared: all experts have one of A and B in common."""
    (part,) = site.slices
    g = torch.Generator().manual_seed(size)
    of_a, of_b = (1, EXPERTS) if part.module == "gate_up_proj" else (EXPERTS, 1)
    counts = (of_a, of_b) if shared else (EXPERTS, EXPERTS)
    a, b = (
        torch.randn(count, 3, width, generator=g, dtype=torch.float64)
        for count, width in zip(counts, (site.in_features, part.out_features), strict=True)
    )
    x = torch.randn(EXPERTS, 5, site.in_features, generator=g, dtype=torch.float64)
    y = torch.zeros(EXPERTS, 5, part.out_features, dtype=torch.float64)
    for rank in range(size):
        (own,) = cut(Adapter((LowRank(0, part.module, a, b, 0.5),), "f"), (site,), rank, size).blocks
        assert isinstance(own, LowRank) and (len(own.a), len(own.b)) == counts
        held = inputs_of(site, rank, size)
        outs = [i for block in output_blocks_of(site, part, rank, size) for i in block]
        y[..., outs] += x[..., held.start : held.stop] @ own.a.mT @ own.b * own.scaling
    torch.testing.assert_close(y, 0.5 * x @ a.mT @ b)


@pytest.mark.parametrize("size", [1, 3])
def test_low_rank_of_experts_that_lie_on_one_rank_each(size: int) -> None:
    site = experts_site("gate_up_proj", shard=Shard.EXPERT)
    a, b = torch.randn(1, 3, HIDDEN), torch.randn(EXPERTS, 3, 2 * INNER)
    found = [cut(Adapter((LowRank(0, "gate_up_proj", a, b, 0.5),), "f"), (site,), rank, size) for rank in range(size)]
    owns = [own for adapter in found for own in adapter.blocks]
    assert all(isinstance(own, LowRank) and torch.equal(own.a, a) for own in owns)
    assert torch.equal(torch.cat([own.b for own in owns]), b)
