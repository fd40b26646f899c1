"""kohya's files: the same adapter, under flat names."""

import pytest
import torch

from multilora.adapter_tools.convert.kohya import is_kohya, read_kohya
from multilora.errors import AdapterInvalid, AdapterUnsupported

Q = "lora_te_model_layers_0_self_attn_q_proj"


def tensors(module=Q, rank=4, alpha=2.0):
    found = {
        f"{module}.lora_down.weight": torch.randn(rank, 8),
        f"{module}.lora_up.weight": torch.randn(16, rank),
    }
    return found if alpha is None else found | {f"{module}.alpha": torch.tensor(alpha)}


def test_modules_ranks_and_alphas():
    given = tensors() | tensors("lora_te_layers_1_mlp_down_proj", rank=8, alpha=None)
    assert is_kohya(given)
    found = read_kohya(given, None)
    q, down = found.pairs["model.layers.0.self_attn.q_proj"], found.pairs["model.layers.1.mlp.down_proj"]
    assert torch.equal(q.a, given[f"{Q}.lora_down.weight"]) and torch.equal(q.b, given[f"{Q}.lora_up.weight"])
    assert (q.scaling, down.scaling) == (0.5, 1.0)  # without alpha it is the rank
    config, _ = found.written("base")
    assert config["base_model_name_or_path"] == "base" and len(config["target_modules"]) == 2


def test_names_by_the_base_model():
    paths = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    found = read_kohya(tensors("lora_te_transformer_h_1_attn_c_attn"), paths)
    assert list(found.pairs) == ["transformer.h.1.attn.c_attn"]
    with pytest.raises(AdapterInvalid, match="the base model has no such module"):
        read_kohya(tensors("lora_te_transformer_h_2_attn_c_attn"), paths)
    with pytest.raises(AdapterInvalid, match="give --model-path"):
        read_kohya(tensors("lora_te_transformer_h_1_attn_c_attn"), None)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("lora_unet_down_blocks_0_attn.lora_down.weight", AdapterUnsupported, "image model"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", AdapterUnsupported, "image model"),
        (f"{Q}.hada_w1_a", AdapterUnsupported, "LoHa"),
        (f"{Q}.lokr_w1", AdapterUnsupported, "LoKr"),
        (f"{Q}.lora_mid.weight", AdapterUnsupported, "Tucker"),
        (f"{Q}.dora_scale", AdapterUnsupported, "dora_scale"),
        (f"{Q}.something", AdapterInvalid, "no such tensor"),
    ],
)
def test_refused_by_name(name, error, said):
    with pytest.raises(error, match=said):
        read_kohya(tensors() | {name: torch.zeros(1)}, None)


def test_a_half_is_missing():
    given = tensors()
    del given[f"{Q}.lora_up.weight"]
    with pytest.raises(AdapterInvalid, match="lora_down or lora_up is missing"):
        read_kohya(given, None)


def test_others_are_not_kohya_s():
    assert not is_kohya(["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])
