"""The contract: what modules declare, and what follows from it, against transformers' own modules."""

from pathlib import Path

import pytest
import torch
from fakes.models import FAMILIES, make_tiny_model

from multilora.layers.embedding import Embedding, LMHead
from multilora.layers.linear import Linear
from multilora.layers.norm import RMSNorm
from multilora.lora.sites import MODEL_LEVEL, LoraSite, Shard, module_path, module_shapes, num_layers
from multilora.models.base import CausalLM
from multilora.models.load import make_model

META = torch.device("meta")


def on_meta(path: Path) -> CausalLM:
    return make_model(str(path), device=META)


def test_sites_of_a_model(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, "qwen3")  # head_dim 32: q is wider than hidden
    sites = on_meta(tmp_path).lora_sites()
    assert [s.index for s in sites] == list(range(10))
    assert [s.name for s in sites if s.layer == MODEL_LEVEL] == ["embed_tokens", "lm_head"]
    assert [s.name for s in sites if s.layer == 1] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert num_layers(sites) == 2
    [qkv] = [s for s in sites if (s.layer, s.name) == (1, "qkv_proj")]
    assert [(s.module, s.offset) for s in qkv.slices] == [("q_proj", 0), ("k_proj", 128), ("v_proj", 192)]
    assert module_shapes(sites) == {
        "embed_tokens": (101, 64),
        "q_proj": (64, 128),
        "k_proj": (64, 64),
        "v_proj": (64, 64),
        "o_proj": (128, 64),
        "gate_proj": (64, 96),
        "up_proj": (64, 96),
        "down_proj": (96, 64),
        "lm_head": (64, 101),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_with_parameters_has_declared_itself(family: str, tmp_path: Path) -> None:
    reference = make_tiny_model(tmp_path, family)
    model = on_meta(tmp_path)
    declared = {module_path(site.layer, s.parent, s.module) for site in model.lora_sites() for s in site.slices}
    declared |= {module_path(norm.layer, norm.parent, norm.module) for norm in model.norms()}
    assert declared == {name.rpartition(".")[0] for name, _ in reference.named_parameters()}
    for norm in model.norms():
        name = module_path(norm.layer, norm.parent, norm.module)
        assert tuple(reference.get_parameter(f"{name}.weight").shape) == (norm.size,)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_declarations_are_those_of_the_modules(family: str, tmp_path: Path) -> None:
    """In a model's own tree each declaration belongs to the module at its path, or merged at its parent's."""
    make_tiny_model(tmp_path, family)
    model = on_meta(tmp_path)
    sites, norms = [], []
    for path, module in model.named_modules():
        if isinstance(module, RMSNorm):
            norms.append(module.norm)
            assert path == module_path(module.norm.layer, module.norm.parent, module.norm.module)
        elif isinstance(module, Linear | Embedding | LMHead):
            sites.append(module.site)
            for part in module.site.slices:
                merged = module_path(module.site.layer, part.parent, module.site.name)
                assert path == merged
    assert sorted(sites, key=lambda s: s.index) == list(model.lora_sites())
    assert set(norms) == set(model.norms())
    assert [s.index for s in model.lora_sites()] == list(range(len(sites)))


def test_how_modules_shard_and_what_acts_before_the_kv(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, "qwen3")
    model = on_meta(tmp_path)
    slices = {s.module: s for site in model.lora_sites() for s in site.slices}
    shards: dict[Shard, set[str]] = {}
    for name, part in slices.items():
        shards.setdefault(part.shard, set()).add(name)
    assert shards == {
        Shard.COLUMN: {"q_proj", "gate_proj", "up_proj"},
        Shard.KV: {"k_proj", "v_proj"},
        Shard.ROW: {"o_proj", "down_proj"},
        Shard.VOCAB: {"embed_tokens", "lm_head"},
    }
    before = {name for name, part in slices.items() if part.before_kv}
    before |= {norm.module for norm in model.norms() if norm.before_kv}
    assert before == {"embed_tokens", "input_layernorm", "k_proj", "v_proj", "k_norm"}
    assert {site.experts for site in model.lora_sites()} == {0}


def test_what_the_engine_asks_of_a_model(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, "mistral")
    model = on_meta(tmp_path)
    shape = model.attention_shape
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.sliding_window) == (4, 2, 16, 12)
    assert shape.scale == 0.25
    assert model.kv_layout(8).page_bytes == 2 * 2 * 8 * 2 * 16 * 4
    assert model.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert model.base_weight(1, "up_proj")[0].shape == (96, 64)
    for layer, module in ((2, "up_proj"), (MODEL_LEVEL, "embed_tokens"), (0, "input_layernorm")):
        with pytest.raises(KeyError):
            model.base_weight(layer, module)


def test_a_class_that_misses_a_part_of_the_contract_is_no_model() -> None:
    class Headless(CausalLM):
        def lora_sites(self) -> tuple[LoraSite, ...]:
            return ()

    with pytest.raises(TypeError, match=r"abstract methods .*embed.*forward.*logits"):
        Headless(None, META)  # type: ignore[abstract, arg-type]
