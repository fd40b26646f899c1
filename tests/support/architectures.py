"""Every causal LM that transformers can build, as a tiny random model: what the walk over its mapping needs."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MOST_PARAMETERS = 16_000_000
"""Of a tiny model: one that is larger has a size that the tables below do not know."""

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 96,
    "attention_multiplier": 0.25,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 256,
    "n_ctx": 256,
    "n_inner": 96,
    "dff": 96,
    "ffn_dim": 96,
    "d_model": 64,
    "d_ff": 96,
    "num_layers": 2,
    "embedding_size": 64,
    "rotary_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": 12,
    "is_decoder": True,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "image_size": 28,
    "patch_size": 14,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "state_size": 8,
}

LATENT = {"head_dim": 8, "num_key_value_heads": 4}
"""Of latent attention: one key for all heads is turned, and every head has values of its own."""

ROPE = {"rope_type": "default", "rope_theta": 1e4}

OTHER: dict[str, dict[str, Any]] = {
    "dots1": {"n_shared_experts": 1},
    "longcat_flash": {**LATENT, "num_layers": 2, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 96},
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "axk1", "glm4_moe_lite"), LATENT),
    "youtu": {**LATENT, "pad_token_id": None},  # transformers zeroes the row of a padding token when it loads one
    "minicpm3": {"head_dim": 24, "num_key_value_heads": 4},
    "phi3": {"sliding_window": None},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_output_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "moshi": {"audio_vocab_size": 16},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layer_types": ["hybrid", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 101,
    },
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
    },
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "flint": {"mlp_only_layers": [0]},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "qwen2_moe": {"decoder_sparse_step": 1},
}
"""model_type → what its config needs besides or instead of `SIZES`."""

LEFT_OUT = ("is_encoder_decoder",)


def architectures() -> Iterator[tuple[str, str]]:
    """Every class of transformers' causal-LM mapping with a model_type, in the order of the mapping."""
    found: dict[str, list[str]] = {}
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in names if isinstance(names, tuple | list) else (names,):
            found.setdefault(name, []).append(model_type)
    for name, kinds in found.items():
        own = (
            getattr(getattr(transformers, name).config_class, "model_type", kinds[0]) if len(kinds) > 1 else kinds[0]
        )
        yield name, own if own in kinds else kinds[0]


def tiny_config(model_type: str, architecture: str) -> Any:
    """The config of a small model of this kind, with the architecture's name in it."""
    config = _config(CONFIG_MAPPING[model_type], OTHER.get(model_type, {}))
    config.architectures = [architecture]
    return config


def _config(cls: Any, more: dict[str, Any]) -> Any:
    fields = {**_fields(cls), **more}
    for name, sub in getattr(cls, "sub_configs", {}).items():
        if isinstance(sub, type) and hasattr(sub, "model_type") and name not in more:
            try:
                fields[name] = _config(sub, OTHER.get(sub.model_type, {})).to_dict()
            except Exception:  # noqa: BLE001 - some parts cannot be built alone, then they have their own size
                continue
    return cls(**fields)


def _fields(cls: Any) -> dict[str, Any]:
    known = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "__dataclass_fields__", {}))
    names = {**{name: name for name in SIZES}, **getattr(cls, "attribute_map", {})}
    found = {}
    for name, value in SIZES.items():
        own = names.get(name, name)
        if own in known:
            found[own] = value
    return found


def tiny_model(architecture: str, config: Any, seed: int = 0) -> Any:
    """A random model in fp32 of transformers' class `architecture`, in eval mode."""
    cls = getattr(transformers, architecture)
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{architecture}: {count} parameters are no tiny model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
        for name, weight in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            weight.data.normal_(mean=mean, std=0.2)
    return model.eval()
