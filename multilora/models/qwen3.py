"""Qwen3: Llama with a norm on every head of q and k before the rotation, and a head_dim of its own."""

from typing import Any

from multilora.models.config import uniform_window
from multilora.models.llama import LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    @classmethod
    def settings(cls, hf: Any) -> dict[str, Any]:
        return {
            "qk_norm": True,
            "qkv_bias": hf.attention_bias,
            "o_bias": hf.attention_bias,
            "sliding_window": uniform_window(hf),
        }
