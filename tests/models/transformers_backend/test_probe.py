"""What is found out about a model without weights, and what is refused, by name, before any is read.

Covers `transformers_backend/config.py` too.
"""

from typing import Any

import pytest
import torch
from architectures import tiny_config

from multilora.errors import ConfigError, ModelUnsupported
from multilora.models.transformers_backend.config import TreeConfig, tree_config
from multilora.models.transformers_backend.probe import TOKENS


def configured(architecture: str, model_type: str, context_length: int | None = None, **fields: Any) -> TreeConfig:
    config = tiny_config(model_type, architecture)
    for name, value in fields.items():
        setattr(config, name, value)
    return tree_config(config, generation=None, context_length=context_length, dtype=torch.float32)


def test_gemma_2() -> None:
    config = configured("Gemma2ForCausalLM", "gemma2")
    shape = config.attention
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.softcap) == (4, 2, 16, 50.0)
    assert (shape.layer_windows, shape.sliding_window, shape.scale) == ((12, None), None, 256**-0.5)
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (2, 64, 101)
    assert config.tie_word_embeddings
    found = config.examination
    assert [f.path for f in found.linears][:4] == [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"]
    assert [f.attended for f in found.linears][:4] == [0, 0, 0, 1]
    assert {f.token_dim for f in found.norms} == {1}


def test_gpt_oss_has_sinks_and_qwen_3_norms_of_heads() -> None:
    assert configured("GptOssForCausalLM", "gpt_oss").attention.sinks
    norms = {f.path: f for f in configured("Qwen3ForCausalLM", "qwen3").examination.norms}
    assert norms["model.layers.1.self_attn.k_norm"].size == 16


@pytest.mark.parametrize(
    ("architecture", "model_type", "rotated"),
    [
        ("LlamaForCausalLM", "llama", [True, True]),
        ("Qwen3ForCausalLM", "qwen3", [True, True]),  # norms of heads come before
        ("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", [False, False]),  # and here behind
        ("DiffLlamaForCausalLM", "diffllama", [True, False] * 2),  # attends twice to what it has rotated once
        ("PhiForCausalLM", "phi", [False, False]),  # rotates a part of each head
        ("GPT2LMHeadModel", "gpt2", [False, False]),
    ],
)
def test_which_layers_leave_their_rotation_to_attention(
    architecture: str, model_type: str, rotated: list[bool]
) -> None:
    assert [a.rotated for a in configured(architecture, model_type).examination.attentions] == rotated


def test_layers_that_read_the_same_tensor_have_one_source() -> None:
    found = {
        f.path.removeprefix("model.layers."): f.source
        for f in configured("LlamaForCausalLM", "llama").examination.linears
    }
    for layer in "01":
        q, k, v, o = (found[f"{layer}.self_attn.{name}_proj"] for name in "qkvo")
        gate, up, down = (found[f"{layer}.mlp.{name}_proj"] for name in ("gate", "up", "down"))
        assert q == k == v and gate == up and len({q, o, gate, down}) == 4
    assert len(set(found.values())) == 9  # and the head


def test_the_examination_leaves_nothing_behind() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    configured("LlamaForCausalLM", "llama")
    for interface in (AttentionInterface(), AttentionMaskInterface()):
        assert not [name for name in interface if "probe" in name]
    assert TOKENS not in (16, 64, 96, 101)


@pytest.mark.parametrize(
    ("architecture", "model_type", "reason"),
    [
        ("MambaForCausalLM", "mamba", "its decoder takes no position_ids"),
        ("BambaForCausalLM", "bamba", "it mixes tokens by convolution"),
        ("BartForCausalLM", "bart", "it is an encoder with a decoder"),
        ("GPTNeoForCausalLM", "gpt_neo", "does not go through transformers' attention interface"),
        ("DogeForCausalLM", "doge", "makes masks of its own, or adds a position bias"),
        ("MiMoV2FlashForCausalLM", "mimo_v2_flash", "its layers have different KV heads"),
        ("DeepseekV32ForCausalLM", "deepseek_v32", "its attention takes indices, which pages do not have"),
        ("MiniMaxForCausalLM", "minimax", "its forward pass depends on data"),
        ("XForCausalLM", "llama", "transformers has no causal LM of this name for model_type 'llama'"),
    ],
)
def test_refused_by_name_with_the_reason(architecture: str, model_type: str, reason: str) -> None:
    with pytest.raises(ModelUnsupported, match=reason) as caught:
        configured(architecture, model_type)
    assert architecture in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"architectures": None}, "architecture unknown"),
        ({"architectures": ["A", "B"]}, "architecture A, B"),
        ({"num_key_value_heads": 3}, "LlamaForCausalLM is not supported"),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelUnsupported, match=said):
        configured("LlamaForCausalLM", "llama", **fields)


def test_context_length() -> None:
    assert configured("LlamaForCausalLM", "llama").context_length == 256
    assert configured("LlamaForCausalLM", "llama", 100).context_length == 100
    with pytest.raises(ConfigError, match="--context-length 300 is more than the model's 256"):
        configured("GPT2LMHeadModel", "gpt2", 300)
