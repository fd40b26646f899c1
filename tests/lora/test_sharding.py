"""Local sites: as wide as a rank's part on every rank, whatever the module is cut by; what cannot be cut is named."""

import pytest
import torch
from fakes.models import make_tiny_model

from multilora.errors import ConfigError
from multilora.lora.sharding import (
    experts_of,
    inputs_of,
    local_site,
    local_sites,
    output_blocks_of,
    outputs_of,
    sums_over_ranks,
)
from multilora.lora.sites import LoraSite, LoraSlice, Shard, module_shapes
from multilora.models.load import make_model


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoraSite, ...]:
    """Four heads of 32, two KV heads, a vocabulary of 101."""
    path = tmp_path_factory.mktemp("model")
    make_tiny_model(path, "qwen3")
    return make_model(str(path), device=torch.device("meta")).lora_sites()


def test_widths(sites: tuple[LoraSite, ...]) -> None:
    assert local_sites(sites, 1) == sites
    assert module_shapes(local_sites(sites, 2)) == {
        "embed_tokens": (64, 64),  # 51 of 101 tokens, padded
        "q_proj": (64, 64),
        "k_proj": (64, 32),
        "v_proj": (64, 32),
        "o_proj": (64, 64),
        "gate_proj": (64, 48),
        "up_proj": (64, 48),
        "down_proj": (48, 64),
        "lm_head": (64, 64),
    }
    assert module_shapes(local_sites(sites, 4))["k_proj"] == (64, 32), "one KV head on two ranks"
    assert [site.index for site in local_sites(sites, 4)] == [site.index for site in sites]


@pytest.mark.parametrize("size", [2, 4])
def test_every_column_is_held(sites: tuple[LoraSite, ...], size: int) -> None:
    """And as often as the ranks' results are put together: summed, or side by side."""
    for site in sites:
        ranks = range(size)
        local = local_site(site, size)
        inputs = [i for rank in ranks for i in inputs_of(site, rank, size)]
        everything = list(range(site.in_features))
        assert inputs == (everything if sums_over_ranks(site) else everything * size)
        assert all(len(inputs_of(site, rank, size)) <= local.in_features for rank in ranks)
        assert local.slices[0].offset == 0
        for part, own in zip(site.slices, local.slices, strict=True):
            held = [outputs_of(site, part, rank, size) for rank in ranks]
            assert {i for columns in held for i in columns} == set(range(part.out_features))
            assert all(len(columns) <= own.out_features for columns in held)
            assert (own.module, own.parent, own.before_kv) == (part.module, part.parent, part.before_kv)


@pytest.mark.parametrize(("size", "said"), [(3, "q_proj, k_proj, v_proj: 4 x 32 columns"), (8, "4 x 32 columns")])
def test_heads_that_do_not_divide_are_named(sites: tuple[LoraSite, ...], size: int, said: str) -> None:
    with pytest.raises(ConfigError, match=f"--tp-size {size}: .*{said} cannot be divided into {size}"):
        local_sites(sites, size)


def experts(**gate_up: int) -> tuple[LoraSite, LoraSite]:
    """Three experts of 24 inputs and 8 of inner width, each of which ranks cut."""
    both = LoraSlice("experts.gate_up_proj", 0, 16, shard=Shard.COLUMN, **gate_up)
    down = LoraSlice("experts.down_proj", 0, 24, shard=Shard.ROW)
    return LoraSite(0, 0, "gate_up", 24, (both,), experts=3), LoraSite(1, 0, "down", 8, (down,), experts=3)


@pytest.mark.parametrize(
    ("gate_up", "of_second"),
    [({"blocks": 2}, (range(4, 8), range(12, 16))), ({"unit": 2}, (range(8, 16),))],
    ids=["gate, then up", "in turns"],
)
def test_every_rank_has_a_part_of_each_expert(gate_up: dict[str, int], of_second: tuple[range, ...]) -> None:
    both, down = experts(**gate_up)
    assert output_blocks_of(both, both.slices[0], 1, 2) == of_second
    assert (inputs_of(both, 1, 2), inputs_of(down, 1, 2)) == (range(24), range(4, 8))
    assert output_blocks_of(down, down.slices[0], 1, 2) == (range(24),)
    assert [sums_over_ranks(site) for site in (both, down)] == [False, True]
    for site, width, outs in zip((both, down), (24, 4), (8, 24), strict=True):
        local = local_site(site, 2)
        assert (local.in_features, local.out_features, local.experts) == (width, outs, 3)
        assert experts_of(site, 1, 2) == range(3)
    for site in (both, down):
        with pytest.raises(ConfigError, match=rf"--tp-size 3: {site.slices[0].module}: 8 cannot be divided into 3"):
            local_site(site, 3)
