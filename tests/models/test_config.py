"""What is read from a config, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from multilora.errors import ConfigError, ModelUnsupported
from multilora.models.config import NativeConfig
from multilora.models.load import read_config


def config_of(
    tmp_path: Path, prefix: str = "Llama", context_length: int | None = None, **fields: Any
) -> NativeConfig:
    sizes = {"num_key_value_heads": 2} | fields
    config = getattr(transformers, f"{prefix}Config")(
        architectures=[f"{prefix}ForCausalLM"],
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=128,
        **sizes,
    )
    config.save_pretrained(tmp_path)
    found = read_config(str(tmp_path), context_length=context_length, model_impl="native")[1]
    assert isinstance(found, NativeConfig)
    return found


def test_llama(tmp_path: Path) -> None:
    config = config_of(tmp_path, intermediate_size=96, dtype="bfloat16", rms_norm_eps=1e-5)
    assert (config.head_dim, config.q_size, config.kv_size, config.intermediate_size) == (16, 64, 32, 96)
    assert config.dtype == torch.bfloat16
    assert config.context_length == 128
    assert config.rms_norm_eps == 1e-5
    assert config.sliding_window is None
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)


def test_families_differ_where_they_should(tmp_path: Path) -> None:
    assert config_of(tmp_path, "Mistral", sliding_window=7).sliding_window == 7
    assert config_of(tmp_path, "Mistral", sliding_window=None).sliding_window is None
    qwen2 = config_of(tmp_path, "Qwen2")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.sliding_window) == (True, False, None)
    qwen3 = config_of(tmp_path, "Qwen3", head_dim=32)
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.q_size) == (True, False, 128)


@pytest.mark.parametrize(
    ("prefix", "fields", "named"),
    [
        ("Llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("Llama", {"pretraining_tp": 2}, "pretraining_tp = 2"),
        (
            "Llama",
            {"quantization_config": {"quant_method": "hqq"}},
            "quant_method 'hqq' is not supported; served:",
        ),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("Llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ("Mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "layer_types"),
        ("Qwen3", {"use_sliding_window": True, "max_window_layers": 1}, "layer_types"),
    ],
)
def test_refused_by_name(tmp_path: Path, prefix: str, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelUnsupported, match=named):
        config_of(tmp_path, prefix, **fields)


def test_longrope_is_refused(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
        "factor": 2.0,
    }
    with pytest.raises(ModelUnsupported, match="longrope"):
        config_of(tmp_path, rope_parameters=rope)


def test_context_length(tmp_path: Path) -> None:
    assert config_of(tmp_path, context_length=100).context_length == 100
    with pytest.raises(ConfigError, match="129 is more than the model's 128"):
        config_of(tmp_path, context_length=129)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    assert config_of(tmp_path, rope_parameters=yarn).context_length == 128
    assert config_of(tmp_path, rope_parameters=yarn, context_length=512).context_length == 512
    with pytest.raises(ConfigError, match="513"):
        config_of(tmp_path, rope_parameters=yarn, context_length=513)


def test_eos_ids_come_from_both_files(tmp_path: Path) -> None:
    assert config_of(tmp_path, eos_token_id=2).eos_token_ids == (2,)
    assert config_of(tmp_path, eos_token_id=None).eos_token_ids == ()
    transformers.GenerationConfig(eos_token_id=[5, 7]).save_pretrained(tmp_path)
    assert config_of(tmp_path, eos_token_id=[2, 7]).eos_token_ids == (5, 7, 2)


def test_old_style_rope_scaling(tmp_path: Path) -> None:
    """Checkpoints from before transformers 5 have rope_theta and rope_scaling, with `type` for `rope_type`."""
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,'
        ' "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float16"}'
    )
    config = read_config(str(tmp_path))[1]
    assert config.rope.inv_freq[0] == 0.5
    assert config.rope.inv_freq[1] == pytest.approx(0.5 / 500 ** (1 / 8))
    assert config.dtype == torch.float16
