"""mlx-lm's files: transposed matrices, a scale."""

import pytest
import torch

from multilora.adapter_tools.convert.mlx import is_mlx, read_mlx
from multilora.errors import AdapterInvalid, AdapterUnsupported

CONFIG = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}
Q = "model.layers.0.self_attn.q_proj"


def tensors(module=Q):
    return {f"{module}.lora_a": torch.randn(8, 4), f"{module}.lora_b": torch.randn(4, 16)}


def test_matrices_and_scale():
    given = tensors()
    pair = read_mlx(CONFIG, given).pairs[Q]
    torch.testing.assert_close(pair.delta(), 20.0 * (given[f"{Q}.lora_a"] @ given[f"{Q}.lora_b"]).T)
    assert read_mlx(CONFIG, given).alphas == {Q: 80.0}
    older = {"lora_parameters": {"rank": 4, "alpha": 8.0}}
    assert read_mlx(older, given).pairs[Q].scaling == 2.0


def test_embedding():
    found = read_mlx(CONFIG, tensors("model.embed_tokens"))
    assert found.pairs["model.embed_tokens"].embedding


def test_dora():
    config = CONFIG | {"fine_tune_type": "dora"}
    given = tensors() | {f"{Q}.m": torch.randn(16)}
    written, all_tensors = read_mlx(config, given).written(None)
    assert written["use_dora"] is True
    assert torch.equal(all_tensors[f"base_model.model.{Q}.lora_magnitude_vector"], given[f"{Q}.m"])
    with pytest.raises(AdapterUnsupported, match="some modules"):
        read_mlx(config, given | tensors("model.layers.0.self_attn.v_proj"))
    with pytest.raises(AdapterUnsupported, match="embedding"):
        read_mlx(config, tensors("model.embed_tokens") | {"model.embed_tokens.m": torch.randn(16)})


def test_whose():
    assert is_mlx(CONFIG) and not is_mlx({"peft_type": "LORA"}) and not is_mlx({})


@pytest.mark.parametrize(
    ("config", "extra", "error", "said"),
    [
        (CONFIG | {"fine_tune_type": "full"}, {}, AdapterUnsupported, "'full' is no LoRA"),
        (CONFIG | {"lora_parameters": {"rank": 4}}, {}, AdapterInvalid, "scale is missing"),
        (
            CONFIG,
            {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": torch.zeros(2, 8, 4)},
            AdapterUnsupported,
            "experts",
        ),
        (CONFIG, {"model.norm.weight": torch.zeros(8)}, AdapterUnsupported, "only LoRA and DoRA"),
        (CONFIG, {"model.layers.1.self_attn.q_proj.lora_a": torch.zeros(8, 4)}, AdapterInvalid, "is missing"),
    ],
)
def test_refused_by_name(config, extra, error, said):
    with pytest.raises(error, match=said):
        read_mlx(config, tensors() | extra)
