"""Local sites: as wide as a rank's part on every rank, whatever the module is cut by; what cannot be cut is named."""

import pytest
import torch
from fakes.models import make_tiny_model

from multilora.errors import ConfigError
from multilora.lora.sharding import inputs_of, local_site, local_sites, outputs_of, sums_over_ranks
from multilora.lora.sites import LoraSite, module_shapes
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
