"""The sites of a model: merged, in order, with PEFT's names."""

from pathlib import Path

import torch
from fakes.models import make_tiny_model

from multilora.layers.linear import Linear
from multilora.lora.sites import MODEL_LEVEL, module_shapes, num_layers
from multilora.models.load import load_model


def test_sites_of_a_model(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, "qwen3")  # head_dim 32: q is wider than hidden
    model, _ = load_model(str(tmp_path), device=torch.device("cpu"))
    sites = model.lora_sites()
    assert [s.index for s in sites] == list(range(10))
    assert [s.name for s in sites[8:]] == ["embed_tokens", "lm_head"]
    assert all(s.layer == MODEL_LEVEL for s in sites[8:])
    assert [s.name for s in sites[:4]] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert num_layers(sites) == 2
    assert [(s.module, s.offset) for s in sites[4].slices] == [("q_proj", 0), ("k_proj", 128), ("v_proj", 192)]
    assert module_shapes(sites) == {
        "q_proj": (64, 128),
        "k_proj": (64, 64),
        "v_proj": (64, 64),
        "o_proj": (128, 64),
        "gate_proj": (64, 96),
        "up_proj": (64, 96),
        "down_proj": (96, 64),
        "embed_tokens": (101, 64),
        "lm_head": (64, 101),
    }
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    assert sorted(m.site.index for m in linears) == list(range(8))
    for linear in linears:
        assert tuple(linear.weight.shape) == (linear.site.out_features, linear.site.in_features)
