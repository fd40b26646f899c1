"""Fakes that are part of the product: tiny random models for tests, small enough to build in a moment.

Used by this package's tests and by anyone who tests against it. Imports torch and transformers only when called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TINY_SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# family → (transformers' class prefix, what the family adds to TINY_SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": 12}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


def make_tiny_model(
    path: str | Path, family: str = "llama", *, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any
) -> PreTrainedModel:
    """Write a random fp32 model of this family to directory `path`; returns transformers' own model, in eval mode.

    `overrides` are fields of the transformers config. Norm weights and biases are random too (transformers starts
    them at one and zero), and all weights are large enough that greedy choices are clear.
    """
    import torch
    import transformers

    prefix, extra = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**(TINY_SIZES | extra | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, f"{prefix}ForCausalLM")(config)
        for name, weight in model.named_parameters():
            weight.data.normal_(mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.2)
    model.eval()
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


def make_adapter(
    path: str | Path, model_path: str | Path, *, seed: int = 0, dtype: str = "float32", **config: Any
) -> PeftModel:
    """Write a random LoRA adapter for the model in `model_path` to directory `path`, saved by PEFT itself.

    `config` are the fields of PEFT's LoraConfig; lora_A and lora_B are random, so the adapter changes the output.
    Returns PEFT's model with the adapter on it, in eval mode and fp32; `dtype` is what the file holds, and the
    returned weights have the values rounded to it.
    """
    import warnings

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about transformers' deprecations and unusual configs
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(**config), autocast_adapter_dtype=False)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn_like(weight, dtype=torch.float32).mul_(0.3).to(getattr(torch, dtype))
        model.save_pretrained(str(path))
    model.float().eval()
    return model
